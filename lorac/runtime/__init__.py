"""Running compiled models: calls, swaps, the pool of adapters, artifacts."""
