"""The order of passes, as data.

Each pass is a function Graph -> bool, honest about whether it changed anything. Between any two of them the verifier
runs, and whoever asked may look at the graph (``observe``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from lorac.ir.graph import Graph
from lorac.ir.verify import verify
from lorac.passes.cleanup import cleanup
from lorac.passes.expand import expand
from lorac.passes.insert import insert
from lorac.passes.pack import pack

Pass = Callable[[Graph], bool]
Observer = Callable[[str, Graph], None]


def adapt(aux: tuple[str, ...] = ()) -> tuple[tuple[str, Pass], ...]:
    """From a captured graph to aten ops with slots as inputs.

    Args:
        aux: extra outputs to give.
    """
    return (
        ("insert", insert),
        ("pack", pack),
        ("expand", functools.partial(expand, aux=aux)),
        ("cleanup", cleanup),
    )


def run_pipeline(graph: Graph, passes: Sequence[tuple[str, Pass]], observe: Observer | None = None) -> list[str]:
    """Run passes in order; returns the names of those that changed the graph.

    Raises:
        VerificationFailed: a pass left the graph breaking a rule of its level.
    """
    changed = []
    verify(graph, after="capture")
    for name, step in passes:
        if step(graph):
            changed.append(name)
        verify(graph, after=name)
        if observe is not None:
            observe(name, graph)
    return changed
