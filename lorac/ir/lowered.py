"""From a host to a lowered program: what every backend that emits begins with."""

from __future__ import annotations

from lorac.ir.engine import BuildRequest
from lorac.ir.graph.capture import export
from lorac.ir.graph.graph import Graph
from lorac.ir.graph.signature import CallSignature
from lorac.ir.host.sites import SiteKind
from lorac.ir.slots.reads import tapped


def lowered(request: BuildRequest, aux: tuple[str, ...]) -> tuple[Graph, CallSignature]:
    """The host captured and brought to level expanded, and how it is called.

    Args:
        request: what to build; the answer itself where it brings one (read from an artefact).
        aux: names of extra outputs to give.
    """
    if request.lowered is not None:
        return request.lowered
    marked = (*request.plans, *tapped(request.plans.values()))
    blocks = [path for path in dict.fromkeys(marked) if request.sites[path].kind is SiteKind.BLOCK]
    exported = export(request.model, request.example_inputs, request.dynamic_shapes, blocks=blocks)
    graph = Graph("main", exported, request.sites, request.plans)
    request.lower(graph, aux)
    return graph, CallSignature.of(graph, request.model)
