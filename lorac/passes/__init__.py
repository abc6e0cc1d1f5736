"""Passes that lower a captured graph, with the functions that they share; `pipelines` has their order as data."""
