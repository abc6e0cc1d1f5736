"""Eager PyTorch: the host module itself, in which calls of adapted sites read the sites' slots."""
