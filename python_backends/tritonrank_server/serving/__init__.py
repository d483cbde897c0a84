"""What runs a server: the embedded one and its commands, the image's entry point."""
