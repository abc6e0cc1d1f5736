"""Conversion of a lowered program to an ONNX model: the translations of ops, and the walk that applies them."""
