"""Formulas, the normal forms of their changes, and the reduction of formulas to normal forms."""
