"""The server side of tritonrank: what Triton's Python backends run, the exporter, the server."""

import os

# Of ONNX Runtime, which else tells its maker of its use, and writes into the user's home for it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
