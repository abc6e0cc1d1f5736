"""Passes over graphs, one in each file; their order is data in ``pipelines.py``."""
