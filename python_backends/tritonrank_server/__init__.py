"""The server side of tritonrank: what Triton's Python backends run, the exporter, the server."""
