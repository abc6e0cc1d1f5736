"""Captured computations: programs of graphs, with their edits, checks and reference interpreter."""
