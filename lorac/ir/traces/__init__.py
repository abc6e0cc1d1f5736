"""Traces of functions: one gate for torch's tracers, and records of reads, writes and origins."""
