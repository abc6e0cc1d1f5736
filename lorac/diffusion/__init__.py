"""Image generation with adapters: loops of ordinary Python over compiled parts, one file per composition."""
