"""Lower a session's model to the program of a target: capture it, check it against the model, and run the passes."""
