"""ONNX Runtime: adapters are inputs of a session, bound anew to swap; nothing is ever rebuilt."""
