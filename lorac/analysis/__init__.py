"""One file per report about a compiled model."""
