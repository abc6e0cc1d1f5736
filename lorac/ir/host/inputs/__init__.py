"""What a model is called with: example inputs, sizes that vary, rows, and what of a call is a constant of a program."""
