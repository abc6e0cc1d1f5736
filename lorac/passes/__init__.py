"""Passes that lower a captured graph, and functions that they share; `pipelines` has their order as data."""
