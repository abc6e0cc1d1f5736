"""What compile() was asked for: every argument, checked once."""
