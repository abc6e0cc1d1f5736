"""ONNX Runtime: adapters are inputs of a session, and a swap binds other values without rebuilding anything."""
