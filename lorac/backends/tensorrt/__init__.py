"""TensorRT: one plan for several GPUs, whose inputs an adapter fills; a swap sets addresses and rebuilds nothing."""
