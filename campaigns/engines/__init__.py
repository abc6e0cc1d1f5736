"""Adapters of every method, converted for every engine, and read by the engine's own code."""
