"""One file per pass; their order is data, in ``pipelines.py``."""
