"""OpenVINO: the same files, compiled for a processor; infer requests hold a choice's tensors, in one precision."""
