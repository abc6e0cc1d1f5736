"""From a session's model to the program of a target: capture, its check against the model, and the passes."""
