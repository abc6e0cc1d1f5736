"""Base weights in 8 or 4 bits: the codec, the pass that quantises them, and the dequantised base for adapters."""
