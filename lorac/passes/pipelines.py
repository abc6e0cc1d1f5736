"""The order of passes, as data, and what runs them.

Between any two passes the verifier runs, and whoever asked may look at the graph (``observe``).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from lorac.errors import CompileError
from lorac.ir.graph.graph import Graph
from lorac.ir.graph.passes import Pass, PassResult, Skip
from lorac.ir.graph.symbolic_shapes import set_types
from lorac.ir.graph.verify import verify
from lorac.ir.tracing import tracing
from lorac.passes.cache_attention import CacheAttention
from lorac.passes.cleanup import Cleanup
from lorac.passes.connect_values import ConnectValues
from lorac.passes.expand import ExpandAdaptedCalls
from lorac.passes.fuse_projections import FuseProjections
from lorac.passes.insert import InsertAdaptedCalls
from lorac.target.dialect import AnyDialect, Dialect

Observer = Callable[[str, Graph], None]


ANY_DIALECT: AnyDialect = Dialect(name="any")
"""A dialect that asks for nothing of its own."""


def lowering_passes(
    dialect: AnyDialect = ANY_DIALECT, aux: tuple[str, ...] = (), *, constant: bool = False
) -> tuple[Pass, ...]:
    """From a captured graph to what a dialect takes: aten ops with slots as inputs, then its own passes.

    Args:
        dialect: the target's.
        aux: extra outputs to give.
        constant: whether what the slots hold becomes constants of the program.
    """
    packed = (FuseProjections(constant),) if dialect.fuses_projections else ()
    return (
        *packed,
        InsertAdaptedCalls(),
        ConnectValues(),
        ExpandAdaptedCalls(aux),
        CacheAttention(),
        Cleanup(),
        *dialect.passes,
    )


def run_pipeline(graph: Graph, passes: Sequence[Pass], observe: Observer | None = None) -> list[tuple[str, PassResult]]:
    """Run passes in order; returns the name and the outcome of each.

    A pipeline goes on from where the graph is: passes at its beginning that read a level the graph has left are passed
    over, and their outcome says so. Behind them every pass must find the level it reads. A pipeline of passes that the
    graph has left behind altogether, one pass alone for instance, is a mistake and is refused.

    Args:
        graph: edited in place.
        passes: in order.
        observe: called with ``"capture"`` before the first, then with the name of each pass that changed the graph.

    Raises:
        CompileError: a pass reads another level than the graph is at.
        CompileError: a pass left the graph breaking a rule of its level.
    """
    verify(graph, after="capture")
    if observe is not None:
        observe("capture", graph)
    over = list(itertools.takewhile(lambda step: step.reads < graph.level, passes))
    if over and len(over) == len(passes):
        raise _wrong_level(over[0], graph, passes)
    behind = Skip(graph.name, f"the graph is at level {_name(graph)} already")
    outcomes = [(step.name, PassResult(changed=False, skipped=(behind,))) for step in over]
    for step in passes[len(over) :]:
        if graph.level is not step.reads:
            raise _wrong_level(step, graph, passes)
        outcome = _run(step, graph)
        outcomes.append((step.name, outcome))
        if outcome.changed and observe is not None:
            observe(step.name, graph)
    set_types(graph)
    return outcomes


def _run(step: Pass, graph: Graph) -> PassResult:
    """Run one pass. A graph that has come to another level has changed, even where no node has."""
    with tracing():
        outcome = step.apply(graph)
    graph.level = step.leaves
    verify(graph, after=step.name)
    return PassResult(outcome.changed or step.leaves is not step.reads, outcome.skipped)


def _wrong_level(step: Pass, graph: Graph, passes: Sequence[Pass]) -> CompileError:
    """The refusal to run a pass on a graph that is not at the level it reads."""
    what = f"the pass '{step.name}' reads level {step.reads.name.lower()}, but graph '{graph.name}' is at"
    known = list({other.name: other for other in (*lowering_passes(), *passes)}.values())
    next_step = _before(step, graph, known) if graph.level < step.reads else _too_late(step, known)
    return CompileError(f"{what} level {_name(graph)}", next_step=next_step, code="wrong_level")


def _before(step: Pass, graph: Graph, known: Sequence[Pass]) -> str:
    """Which passes lead from the graph's level to the one a pass reads."""
    missing = [p.name for p in known if graph.level <= p.reads < p.leaves <= step.reads]
    if not missing:
        return f"no pass of the pipeline leads from level {_name(graph)} to that"
    return f"run {' and '.join(map(repr, missing))} before it"


def _too_late(step: Pass, known: Sequence[Pass]) -> str:
    """Which pass took the graph past the level that a pass reads."""
    past = [p.name for p in known if p.reads <= step.reads < p.leaves]
    if step.name in past:
        return "it has run already; capture the host again to run it anew"
    return f"run it before {' or '.join(map(repr, past)) or 'the graph leaves that level'}, on a new capture"


def _name(graph: Graph) -> str:
    return graph.level.name.lower()
