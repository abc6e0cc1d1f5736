"""Formulas, the normal forms of their changes, and the reduction of a formula to a normal form."""
