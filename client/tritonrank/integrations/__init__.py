"""The clients in other frameworks. Each module needs its framework, which an extra installs."""
