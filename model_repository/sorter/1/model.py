from tritonrank_server.stages.triton import SorterModel as TritonPythonModel  # noqa: F401
