from tritonrank_server.triton import TokenizerModel as TritonPythonModel  # noqa: F401
