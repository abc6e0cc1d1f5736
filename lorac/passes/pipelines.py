"""The order of passes, as data, and the function that runs them.

After each pass the verifier runs, and an observer may look at the graph.
"""

import itertools
from collections.abc import Callable, Sequence

from lorac.errors import CompileError
from lorac.ir.graph.graph import Graph
from lorac.ir.graph.passes import Pass, PassResult, Skip
from lorac.ir.graph.verify import verify
from lorac.ir.traces.gate import tracing
from lorac.passes.cache_attention import CacheAttention
from lorac.passes.cleanup import Cleanup
from lorac.passes.connect_values import ConnectValues
from lorac.passes.expand import ExpandAdaptedCalls
from lorac.passes.fuse_projections import FuseProjections
from lorac.passes.insert import InsertAdaptedCalls
from lorac.target.dialect import AnyDialect, Dialect

Observer = Callable[[str, Graph], None]


ANY_DIALECT: AnyDialect = Dialect(name="any")
"""A dialect without passes or rewrites."""


def lowering_passes(
    dialect: AnyDialect = ANY_DIALECT, aux: tuple[str, ...] = (), *, constant: bool = False, rows: bool = False
) -> tuple[Pass, ...]:
    """Return the passes that lower a captured graph to aten ops with slots as inputs, then the dialect's own.

    Args:
        aux: names of extra outputs.
        constant: whether the slots become constants of the program.
        rows: whether rows of a batch may have slots of their own.
    """
    fused = (FuseProjections(constant),) if dialect.fuses_projections else ()
    return (
        *fused,
        InsertAdaptedCalls(rows, dialect.why_shared, dialect.why_branches_shared),
        ConnectValues(),
        ExpandAdaptedCalls(aux),
        CacheAttention(),
        Cleanup(),
        *dialect.passes,
    )


def run_pipeline(graph: Graph, passes: Sequence[Pass], observe: Observer | None = None) -> list[tuple[str, PassResult]]:
    """Run passes in order; return the name and the result of each.

    The first passes are skipped if the graph has left the level that they read, and their results say so. Every later
    pass must find the level that it reads. A pipeline that would be skipped altogether is refused as a mistake.

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
    skipped = list(itertools.takewhile(lambda step: step.reads < graph.level, passes))
    if skipped and len(skipped) == len(passes):
        raise _wrong_level(skipped[0], graph, passes)
    behind = Skip(graph.name, f"the graph is at level {_name(graph)} already")
    results = [(step.name, PassResult(changed=False, skipped=(behind,))) for step in skipped]
    for step in passes[len(skipped) :]:
        if graph.level is not step.reads:
            raise _wrong_level(step, graph, passes)
        result = _run(step, graph)
        results.append((step.name, result))
        if result.changed and observe is not None:
            observe(step.name, graph)
    graph.describe_types()
    return results


def _run(step: Pass, graph: Graph) -> PassResult:
    """Run one pass. A graph at another level has changed, even if no node has."""
    with tracing():
        result = step.apply(graph)
    graph.level = step.leaves
    verify(graph, after=step.name)
    return PassResult(result.changed or step.leaves is not step.reads, result.skipped)


def _wrong_level(step: Pass, graph: Graph, passes: Sequence[Pass]) -> CompileError:
    what = f"the pass '{step.name}' reads level {step.reads.name.lower()}, but graph '{graph.name}' is at"
    known = list({other.name: other for other in (*lowering_passes(), *passes)}.values())
    next_step = _before(step, graph, known) if graph.level < step.reads else _too_late(step, known)
    return CompileError(f"{what} level {_name(graph)}", next_step=next_step, code="wrong_level")


def _before(step: Pass, graph: Graph, known: Sequence[Pass]) -> str:
    missing = [p.name for p in known if graph.level <= p.reads < p.leaves <= step.reads]
    if not missing:
        return f"no pass of the pipeline leads from level {_name(graph)} to that"
    return f"run {' and '.join(map(repr, missing))} before it"


def _too_late(step: Pass, known: Sequence[Pass]) -> str:
    past = [p.name for p in known if p.reads <= step.reads < p.leaves]
    if step.name in past:
        return "it has run already; capture the host again to run it anew"
    return f"run it before {' or '.join(map(repr, past)) or 'the graph leaves that level'}, on a new capture"


def _name(graph: Graph) -> str:
    return graph.level.name.lower()
