"""Text generation: ``generate`` on every target with transformers' own code, over a cache or the model itself."""
