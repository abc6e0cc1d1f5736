"""The names of the tensors of the normal forms, which the algebra, the slots and the files share.

    ``y' = c∘(W·((d∘x)·T)) + h∘(((x·A)∘g)·B) + bias``

A row of ``lorac.ir.slots.roles`` says where each tensor acts in a running program; ``lorac.ir.algebra.changes`` says
how the tensors are merged and added.
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
"""(R,): scales between the halves of the pair, a separate tensor where sites share A."""
H: Final = "h"
"""(out,): scales after the pair, a separate tensor where sites share B."""
VIRTUAL: Final = "virtual"
"""(n, out): the rows of an embedding's virtual tokens, whose ids follow the vocabulary's."""
WEIGHT: Final = "weight"
"""(out, in): the whole W'."""
DELTA: Final = "delta"
"""(out, in): the matrix added to W, where its factors are unknown."""
BIAS: Final = "bias"
"""(out,): the whole b'; a change stores the difference from b."""

FOLDABLE: Final = frozenset({G, H})
"""Operands that are folded into B at sites without slots for them."""
MERGEABLE: Final = frozenset({C, D, T})
"""Operands besides the pair that can be merged into W'."""
