"""One file per training rule: what a method does around an optimizer's step, on the optimizer's own hooks."""
