"""The names of the tensors of the normal forms, which the algebra, slots and files share.

    ``y' = c∘(W·((d∘x)·T)) + h∘(((x·A)∘g)·B) + bias``

A row of ``lorac.ir.slots.roles`` says where each acts in a running program; ``lorac.ir.algebra.changes`` says how they
merge and add up.
"""

from typing import Final

A: Final = "a"
"""(in, R): the first half of the pair."""
B: Final = "b"
"""(R, out): the second half; every scale but g and h is folded into it."""
C: Final = "c"
"""(out,): scales the output of the base's product."""
D: Final = "d"
"""(in,): scales the input of the base's product."""
T: Final = "t"
"""(n, k, k), n·k = in: blocks of the block-diagonal T that transforms the input of the base's product."""
G: Final = "g"
"""(R,): scales between the halves of the pair, separate where sites share A."""
H: Final = "h"
"""(out,): scales after the pair, separate where sites share B."""
VIRTUAL: Final = "virtual"
"""(n, out): the rows of virtual tokens of an embedding, whose ids follow those of its own."""
WEIGHT: Final = "weight"
"""(out, in): the whole W'."""
DELTA: Final = "delta"
"""(out, in): the matrix added to W where no factors are known."""
BIAS: Final = "bias"
"""(out,): the whole b'; a change holds the difference from b."""

FOLDABLE: Final = frozenset({G, H})
"""Operands that are folded into B at sites without slots for them."""
MERGEABLE: Final = frozenset({C, D, T})
"""Operands next to the pair that W' can hold."""
