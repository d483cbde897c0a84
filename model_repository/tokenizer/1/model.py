from tritonrank_server.stages.triton import TokenizerModel as TritonPythonModel  # noqa: F401
