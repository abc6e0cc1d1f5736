"""TensorRT: one plan for several GPUs, with adapters as inputs; a swap sets addresses and rebuilds nothing."""
