"""Shared parts of targets that read ONNX: emission in a dialect, gates, checks and files."""
