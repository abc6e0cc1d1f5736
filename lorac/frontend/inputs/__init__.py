"""Example inputs of a capture: made from the model's configuration, and their axes that may vary."""
