"""OpenVINO: the same files, compiled for a processor; requests hold the tensors of a choice, in one precision."""
