"""Captured computations: programs of graphs, with their edits, passes, checks and reference interpreter."""
