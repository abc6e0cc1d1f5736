"""The base class of passes, their result, and the function that runs passes in order and verifies after each."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from lorac.errors import CompileError
from lorac.ir.graph.graph import Graph, Level, Skip
from lorac.ir.graph.verify import verify
from lorac.ir.traces.gate import tracing


@dataclass(frozen=True)
class PassResult:
    """The result of one pass.

    Attributes:
        changed: whether the pass changed the graph.
        skipped: the places that the pass left alone, with reasons.
        notes: sentences for whoever calls the program.
        details: further data, of a class that the pass defines, or None.
    """

    changed: bool
    skipped: tuple[Skip, ...] = ()
    notes: tuple[str, ...] = ()
    details: object = None


@dataclass(frozen=True)
class Pass(ABC):
    """One rewrite of a graph; its options are the dataclass's fields.

    A pass that keeps its level may run twice: the second run changes nothing and reports that. A pass that leaves its
    level runs once, since the graph is no longer at the level that it reads.

    Attributes:
        name: in pipelines, dumps and messages.
        reads: the level of the graphs that it takes, checked by ``lorac.ir.graph.passes.run_pipeline``.
        leaves: the level of the graphs afterwards, set by the runner.
    """

    name: ClassVar[str]
    reads: ClassVar[Level]
    leaves: ClassVar[Level]

    @abstractmethod
    def apply(self, graph: Graph) -> PassResult:
        """Edit a graph of level ``reads`` in place, except its ``level``."""


@dataclass(frozen=True)
class TracePass(Pass):
    """A rewrite of a trace, which stays one."""

    reads: ClassVar[Level] = Level.TRACED
    leaves: ClassVar[Level] = Level.TRACED


Observer = Callable[[str, Graph], None]
"""A function that takes the name of a stage and the graph after that stage."""


def run_pipeline(
    graph: Graph, passes: Sequence[Pass], observe: Observer | None = None, *, first: str = "capture"
) -> list[tuple[str, PassResult]]:
    """Run passes in order; return the name and the result of each.

    Leading passes are skipped if the graph is past the level that they read; their results say so. Every later
    pass must find the level that it reads. A pipeline of only skipped passes is refused as a mistake.

    Args:
        graph: edited in place; each pass's skipped places are added to its ``skips``.
        passes: in order.
        observe: called before the first pass, then with the name of each pass that changed the graph.
        first: the stage of the graph before the first pass.

    Raises:
        CompileError: a pass reads another level than the graph is at.
        CompileError: a pass left the graph breaking a rule of its level.
    """
    verify(graph, after=first)
    if observe is not None:
        observe(first, graph)
    skipped = list(itertools.takewhile(lambda step: step.reads < graph.level, passes))
    if skipped and len(skipped) == len(passes):
        raise _wrong_level(skipped[0], graph, passes)
    behind = Skip(graph.name, f"the graph is at level {graph.level.name.lower()} already")
    results = [(step.name, PassResult(changed=False, skipped=(behind,))) for step in skipped]
    for step in passes[len(skipped) :]:
        if graph.level is not step.reads:
            raise _wrong_level(step, graph, passes)
        with tracing():
            result = step.apply(graph)
        # A graph whose level changed has changed, even if no node has.
        result = replace(result, changed=result.changed or step.leaves is not step.reads)
        graph.level = step.leaves
        verify(graph, after=step.name)
        results.append((step.name, result))
        if result.changed and observe is not None:
            observe(step.name, graph)
    graph.skips.update({name: result.skipped for name, result in results if result.skipped})
    graph.describe_types()
    return results


def _wrong_level(step: Pass, graph: Graph, passes: Sequence[Pass]) -> CompileError:
    found, level = graph.level.name.lower(), step.reads.name.lower()
    if graph.level < step.reads:
        missing = [repr(p.name) for p in passes if graph.level <= p.reads < p.leaves <= step.reads]
        next_step = f"run {' and '.join(missing)} before it"
        if not missing:
            next_step = (
                f"run passes that lead from level {found} to level {level} before it; "
                'docs/architecture.md, "Levels", lists them'
            )
    else:
        past = [p.name for p in passes if p.reads <= step.reads < p.leaves]
        next_step = f"run it before {' or '.join(map(repr, past)) or 'the graph leaves that level'}, on a new capture"
        if step.name in past:
            next_step = "it has run already; capture the host again to run it anew"
    return CompileError(
        f"the pass '{step.name}' reads level {level}, but graph '{graph.name}' is at level {found}",
        next_step=next_step,
        code="wrong_level",
    )
