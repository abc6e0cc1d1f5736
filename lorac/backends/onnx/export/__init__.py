"""A lowered program as a model of ONNX: the translations of ops, and the walk that applies them."""
