"""One plan at work on one GPU: what it takes and gives, its contexts, their streams, and CUDA graphs of them."""
