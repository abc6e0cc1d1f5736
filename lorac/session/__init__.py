"""``compile`` and ``load``: the only package that knows all the others."""
