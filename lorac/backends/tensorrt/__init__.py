"""TensorRT: one plan for several GPUs, whose inputs an adapter fills; swapping sets addresses and rebuilds nothing."""
