"""Benchmarks: what each optimisation brings, and how other rerankers do on the same pairs."""
