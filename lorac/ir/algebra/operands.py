"""The tensors of the normal forms by name: what the algebra computes, slots hold and files store bears one name.

    ``y' = c∘(W·((d∘x)·T)) + h∘(((x·A)∘g)·B) + bias``

Where and how each acts on a running program is a row of ``lorac.ir.slots.roles``; how they merge and add up is the
algebra's, in ``lorac.ir.algebra.changes``.
"""

from __future__ import annotations

from typing import Final

A: Final = "a"
"""(in, R): the first half of the pair."""
B: Final = "b"
"""(R, out): the second half, every scale folded in but those kept apart."""
C: Final = "c"
"""(out,): scales what the base's product gives."""
D: Final = "d"
"""(in,): scales what the base's product reads."""
T: Final = "t"
"""(n, k, k), n·k = in: blocks of the block-diagonal T that turns what the base's product reads."""
G: Final = "g"
"""(R,): scales between the halves of the pair, kept apart where sites have A in common."""
H: Final = "h"
"""(out,): scales behind the pair, kept apart where sites have B in common."""
WEIGHT: Final = "weight"
"""(out, in): W' whole."""
BIAS: Final = "bias"
"""(out,): b' whole, of which a change carries the difference from b."""

FOLDABLE: Final = frozenset({G, H})
"""What can be folded into B, and is where a site has no room for it."""
