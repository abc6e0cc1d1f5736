"""What a person sees of a program: rows, printed text, drawings."""
