"""One plan on one GPU: its inputs and outputs, its contexts, their streams, and CUDA graphs."""
