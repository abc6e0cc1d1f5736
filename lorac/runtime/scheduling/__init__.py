"""Continuous batching: requests join and leave a running batch as rows, each with its own adapters."""
