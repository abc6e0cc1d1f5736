"""pack: sites that read the same input share one x·A.

q, k and v (and gate and up) read one x. Their A's become one slot, so the first halves of their low-rank branches are
one matmul, split after by the ranks in a second, small slot. The layout is fixed here, at compile time: sites in graph
order, whatever is active later.
"""

from __future__ import annotations

from lorac.ir.graph import Graph


def pack(graph: Graph) -> bool:
    """Replace the ``a`` operands of sites that share an input by parts of one product."""
    return False
