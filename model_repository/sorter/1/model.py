from tritonrank_server.triton import SorterModel as TritonPythonModel  # noqa: F401
