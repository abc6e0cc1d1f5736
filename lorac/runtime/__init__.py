"""What runs after compilation: calls, swaps, the pool of adapters, artifacts."""
