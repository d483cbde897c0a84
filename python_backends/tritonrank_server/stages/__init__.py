"""The stages of the ensemble, and their adapter to Triton: all that a running server needs."""
