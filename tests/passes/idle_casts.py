"""A pass of somebody else's: casts to the type that a value has already are left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch

from lorac.ir.graph.graph import Graph, Level, Skip
from lorac.ir.graph.passes import Pass, PassResult


@final
@dataclass(frozen=True)
class IdleCasts(Pass):
    """Put the operand of an idle cast in its place."""

    name: ClassVar[str] = "idle-casts"
    reads: ClassVar[Level] = Level.EXPANDED
    leaves: ClassVar[Level] = Level.EXPANDED

    def apply(self, graph: Graph) -> PassResult:
        """As the class says; skipped are casts that do something."""
        changed, skipped = False, []
        for node in graph.find(torch.ops.aten.to.dtype):
            (operand, *_), to = node.all_input_nodes, node.meta["val"].dtype
            if operand.meta["val"].dtype is not to:
                skipped.append(Skip(node.name, f"it casts to {to}"))
                continue
            node.replace_all_uses_with(operand)
            graph.fx.erase_node(node)
            changed = True
        return PassResult(changed, tuple(skipped))


IDLE_CASTS = IdleCasts()
"""The pass that an entry point names."""
