"""Execution of compiled models: calls, swaps, generation, scheduling."""
