"""The order of the passes that lower a captured graph, as data.

``lorac.frontend.capture.pipeline`` has the order of the capturing passes, and ``lorac.ir.graph.passes`` runs both.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from lorac.discovery import list_entry_points
from lorac.errors import CompileError
from lorac.ir.graph.edit import drop_unused_state, update_signature
from lorac.ir.graph.graph import Graph, Level
from lorac.ir.graph.passes import Pass, PassResult
from lorac.passes.cache_attention import CacheAttention
from lorac.passes.connect_values import ConnectValues
from lorac.passes.expand import ExpandAdaptedCalls
from lorac.passes.fuse_projections import FuseProjections
from lorac.passes.insert import InsertAdaptedCalls
from lorac.target.dialect import AnyDialect, Dialect


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


GROUP = "lorac.passes"
"""The entry point group through which other packages add passes."""
ANY_DIALECT: AnyDialect = Dialect(name="any")
"""A dialect without passes or rewrites."""


def lowering_passes(
    dialect: AnyDialect = ANY_DIALECT, aux: tuple[str, ...] = (), *, constant: bool = False, rows: bool = False
) -> tuple[Pass, ...]:
    """Return the passes that lower a captured graph to aten ops with slots as inputs, then the dialect's passes.

    A pass of another package follows lorac's passes of the same level.

    Args:
        dialect: the target's dialect.
        aux: names of extra outputs.
        constant: whether the slots become constants of the program.
        rows: whether rows of a batch may have different slots.

    Raises:
        CompileError: another package adds an object that is not a pass, or a pass that changes the level.
    """
    passes: list[Pass] = [
        *((FuseProjections(constant),) if dialect.fuses_projections else ()),
        InsertAdaptedCalls(rows, dialect.why_shared, dialect.why_branches_shared),
        ConnectValues(),
        ExpandAdaptedCalls(aux),
        CacheAttention(),
        Cleanup(),
        *dialect.passes,
    ]
    for name, entry_point in list_entry_points(GROUP).items():
        step = entry_point.load()
        if not isinstance(step, Pass) or step.reads is not step.leaves:
            raise CompileError(
                f"the entry point '{name}' of the group '{GROUP}' is not a pass that stays on its level",
                next_step="name an instance of a Pass there, as docs/adding.md says",
                code="wrong_level",
            )
        place = next((i for i, other in enumerate(passes) if other.leaves > step.reads), len(passes))
        passes.insert(place, step)
    return tuple(passes)
