"""One adapter from several, and adapters merged into the weights of a model."""
