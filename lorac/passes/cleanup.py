"""cleanup: remove unused nodes and tensors, so that replaced weights leave the program."""

from dataclasses import dataclass
from typing import ClassVar, final

from lorac.ir.graph.edit import drop_unused_state, update_signature
from lorac.ir.graph.graph import Graph, Level
from lorac.ir.graph.passes import Pass, PassResult


@final
@dataclass(frozen=True)
class Cleanup(Pass):
    """Remove dead nodes and unused state, and update the signature."""

    name: ClassVar[str] = "cleanup"
    reads: ClassVar[Level] = Level.EXPANDED
    leaves: ClassVar[Level] = Level.EXPANDED

    def apply(self, graph: Graph) -> PassResult:
        before = len(graph.fx.nodes)
        graph.fx.eliminate_dead_code()
        dropped = drop_unused_state(graph.exported)
        update_signature(graph.exported)
        return PassResult(bool(dropped) or len(graph.fx.nodes) != before)
