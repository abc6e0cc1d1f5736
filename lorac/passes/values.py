"""values: branches that read program values get them as operands (``lorac.ir.slots.reads``).

A base pass is the part of the captured graph that leads to the value, copied with every adapted op undone. What no
adapted op reaches is not copied but shared with the pass that reads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from torch import fx

from lorac.errors import CompileError, SiteUnreached
from lorac.ir.graph import ops
from lorac.ir.graph.adapted import VALUE_ROLE, AdaptedCall, give
from lorac.ir.graph.graph import Graph, Level
from lorac.ir.graph.passes import Outcome, Pass, Skip
from lorac.ir.slots.reads import BASE, WEIGHT, names_read, parse


@final
@dataclass(frozen=True)
class Values(Pass):
    """Add operands ``value:<name>`` to the adapted ops whose branches read values."""

    name: ClassVar[str] = "values"
    reads: ClassVar[Level] = Level.ADAPTED
    leaves: ClassVar[Level] = Level.ADAPTED

    def apply(self, graph: Graph) -> Outcome:
        """As the class says; skipped are the ops that have their values already.

        Raises:
            SiteUnreached: a value is not computed before the site that reads it.
            CompileError: a base pass would write in place.
        """
        found = {node: names_read([graph.plans[ops.site_of(node)]]) for node in graph.find(ops.adapted)}
        reads = {node: names for node, names in found.items() if names}
        given = [node for node, names in reads.items() if _has(AdaptedCall.of(node), names)]
        readers = {node: names for node, names in reads.items() if node not in given}
        if readers:
            _connect(graph, readers)
        return Outcome(bool(readers), tuple(Skip(ops.site_of(node), "it has its values already") for node in given))


def _has(call: AdaptedCall, names: Iterable[str]) -> bool:
    return all(VALUE_ROLE + name in call.operands for name in names)


def _connect(graph: Graph, readers: Mapping[fx.Node, Collection[str]]) -> None:
    """Find what each of the readers reads, by name, and hand it over."""
    order = {node: i for i, node in enumerate(graph.fx.nodes)}
    calls = _calls(graph)
    wanted = {path for names in readers.values() for kind, path in map(parse, names) if kind == BASE}
    latest = {path: calls[path][-1] for path in wanted if path in calls}
    base = _base_pass(graph, latest.values(), next(iter(readers)), order)
    parameters = {fqn: name for name, fqn in graph.exported.graph_signature.inputs_to_parameters.items()}
    for reader, names in readers.items():
        found: dict[str, fx.Node | None] = {}
        for name in names:
            kind, path = parse(name)
            if kind == WEIGHT:
                placeholder = parameters.get(str(graph.sites[path].weight))
                found[name] = None if placeholder is None else graph.node(placeholder)
            elif kind == BASE:
                found[name] = base.get(latest[path], latest[path]) if path in latest else None
            else:
                before = [call for call in calls.get(path, ()) if order[call] < order[reader]]
                found[name] = before[-1] if before else None
        _hand(reader, found)


def _hand(reader: fx.Node, found: Mapping[str, fx.Node | None]) -> None:
    missing = [name for name, node in found.items() if node is None]
    if missing:
        raise SiteUnreached(
            f"the value '{missing[0]}' is not computed before '{ops.site_of(reader)}', which reads it",
            next_step=f"'base:{parse(missing[0])[1]}' reads it from a pass of the unadapted model",
        )
    give(reader, {VALUE_ROLE + name: node for name, node in found.items() if node is not None})


def _calls(graph: Graph) -> dict[str, list[fx.Node]]:
    """Site path -> its calls, in order."""
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.find(*ops.CALLS):
        calls.setdefault(ops.site_of(node), []).append(node)
    return calls


def _base_pass(
    graph: Graph, wanted: Iterable[fx.Node], reader: fx.Node, order: dict[fx.Node, int]
) -> dict[fx.Node, fx.Node]:
    """Copy what leads to the wanted nodes before ``reader``, adapted ops undone; returns node -> copy."""
    needed, pending = set(), list(wanted)
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(AdaptedCall.of(node).tensors if node.target is ops.adapted else node.all_input_nodes)
    copies: dict[fx.Node, fx.Node] = {}
    with graph.fx.inserting_before(reader):
        for node in sorted(needed, key=order.__getitem__):
            late = order[node] >= order[reader]
            if late or node.target is ops.adapted or any(n in copies for n in node.all_input_nodes):
                copies[node] = _undone(graph, node, copies)
    return copies


def _undone(graph: Graph, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    if getattr(getattr(node.target, "_schema", None), "is_mutable", False):
        raise CompileError(
            f"a base pass cannot repeat {node.target}, which writes in place",
            next_step="switch the model's in-place operations (inplace=True) off",
        )
    if node.target is not ops.adapted:
        return graph.fx.node_copy(node, lambda n: copies.get(n, n))
    call = AdaptedCall.of(node)
    plain = graph.fx.call_function(call.op, fx.map_arg(call.unadapted, lambda n: copies.get(n, n)))
    plain.meta = {**node.meta}
    return plain
