from tritonrank_server.triton import CrossEncoderModel as TritonPythonModel  # noqa: F401
