"""From a model to graphs: its sites and tensors, example inputs, copies and skeletons, and its capture."""
