"""Traces of functions: one gate for torch's tracers, and the arguments that ops write to."""
