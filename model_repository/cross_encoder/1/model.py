from tritonrank_server.stages.triton import CrossEncoderModel as TritonPythonModel  # noqa: F401
