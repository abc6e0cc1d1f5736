"""``compile`` and ``load``: the only package that imports all the others."""
