"""The order of passes, as data.

Each pass is a function Graph -> bool, honest about whether it changed anything. Between any two of them the verifier
runs, and whoever asked may look at the graph (``observe``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from lorac.ir.graph.graph import Graph
from lorac.ir.graph.verify import verify
from lorac.passes.cleanup import cleanup
from lorac.passes.expand import expand
from lorac.passes.insert import insert
from lorac.passes.pack import pack
from lorac.passes.values import values

Pass = Callable[[Graph], bool]
Observer = Callable[[str, Graph], None]


def adapt(aux: tuple[str, ...] = ()) -> tuple[tuple[str, Pass], ...]:
    """From a captured graph to aten ops with slots as inputs.

    Args:
        aux: extra outputs to give.
    """
    return (
        ("pack", pack),
        ("insert", insert),
        ("values", values),
        ("expand", functools.partial(expand, aux=aux)),
        ("cleanup", cleanup),
    )


def run_pipeline(graph: Graph, passes: Sequence[tuple[str, Pass]], observe: Observer | None = None) -> list[str]:
    """Run passes in order; returns the names of those that changed the graph.

    Args:
        graph: edited in place.
        passes: (name, pass) in order.
        observe: called with ``"capture"`` before the first, then with the name of each pass that changed the graph.

    Raises:
        VerificationFailed: a pass left the graph breaking a rule of its level.
    """
    changed = []
    verify(graph, after="capture")
    if observe is not None:
        observe("capture", graph)
    for name, step in passes:
        did = step(graph)
        verify(graph, after=name)
        if did:
            changed.append(name)
        if did and observe is not None:
            observe(name, graph)
    return changed
