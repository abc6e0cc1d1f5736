"""Measures of adapters, and the table of methods."""
