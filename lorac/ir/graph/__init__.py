"""Captured computations: programs of graphs, their signatures, edits, checks and reference meaning."""
