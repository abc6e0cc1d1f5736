"""One file per training rule, which acts before or after an optimizer's steps through its hooks."""
