"""Examples, and the real models that they, the tests and the benchmarks share."""
