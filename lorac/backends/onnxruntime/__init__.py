"""ONNX Runtime: adapters are inputs of a session, and a swap binds others; nothing is ever rebuilt."""
