"""Calls of a compiled model whose rows come from many requests: embeddings, and any model's outputs."""
