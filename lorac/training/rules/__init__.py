"""One file per training rule: the work of a method around an optimizer's step, on the optimizer's own hooks."""
