"""Sites and tensors of a model, example inputs, copies and skeletons, and the capture of its graphs."""
