"""Backends: each says which ops it can run, emits them, and binds slots. Each imports without the others' libraries."""
