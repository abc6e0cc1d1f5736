"""Slots: the replaceable inputs of a site, the tensors that fill them, and the computation of adapted sites."""
