"""values: branches that read program values get them as operands (``lorac.ir.slots.reads``).

A base pass is the part of the captured graph that leads to the value, copied with every adapted op undone. What no
adapted op reaches is not copied but shared with the pass that reads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
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
        found = {node: names_read([graph.plan_of(ops.site_of(node))]) for node in graph.find(ops.adapted)}
        reads = {node: names for node, names in found.items() if names}
        readers = {node: names for node, names in reads.items() if not _has(AdaptedCall.of(node), names)}
        if readers:
            _connect(graph, readers)
        given = [ops.site_of(node) for node in reads if node not in readers]
        return Outcome(bool(readers), tuple(Skip(path, "it has its values already") for path in given))


def _has(call: AdaptedCall, names: Iterable[str]) -> bool:
    return all(VALUE_ROLE + name in call.operands for name in names)


@final
@dataclass(frozen=True)
class _Sources:
    """Where the values that branches read are computed.

    Attributes:
        graph: at level adapted.
        order: node -> its place in the graph.
        calls: site path -> its calls, in order.
        base: site path -> its last call, as a pass of the base computes it.
    """

    graph: Graph
    order: Mapping[fx.Node, int]
    calls: Mapping[str, Sequence[fx.Node]]
    base: Mapping[str, fx.Node]

    def of(self, name: str, reader: fx.Node) -> fx.Node | None:
        """The node of the value called ``name`` for a call that reads it; None where it is not computed before that."""
        kind, path = parse(name)
        if kind == WEIGHT:
            return self._weight(path)
        if kind == BASE:
            return self.base.get(path)
        before = [call for call in self.calls.get(path, ()) if self.order[call] < self.order[reader]]
        return before[-1] if before else None

    def _weight(self, path: str) -> fx.Node | None:
        parameters = self.graph.exported.graph_signature.inputs_to_parameters
        wanted = self.graph.sites[path].weight
        return next((self.graph.node(name) for name, fqn in parameters.items() if fqn == wanted), None)


def _connect(graph: Graph, readers: Mapping[fx.Node, Collection[str]]) -> None:
    """Find what each of the readers reads, by name, and hand it over."""
    order = {node: i for i, node in enumerate(graph.fx.nodes)}
    calls = _calls(graph)
    wanted = {path for names in readers.values() for kind, path in map(parse, names) if kind == BASE}
    latest = {path: calls[path][-1] for path in wanted if path in calls}
    copies = _base_pass(graph, latest.values(), next(iter(readers)), order)
    base = {path: copies.get(call, call) for path, call in latest.items()}
    sources = _Sources(graph, order, calls, base)
    for reader, names in readers.items():
        _hand(reader, {name: sources.of(name, reader) for name in names})


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
    needed = _leading_to(wanted)
    copies: dict[fx.Node, fx.Node] = {}
    for node in sorted(needed, key=order.__getitem__):
        late = order[node] >= order[reader]
        if late or node.target is ops.adapted or any(n in copies for n in node.all_input_nodes):
            copies[node] = _undone(graph, node, copies, reader)
    return copies


def _leading_to(wanted: Iterable[fx.Node]) -> set[fx.Node]:
    """The wanted nodes and all that they are computed from, adapted ops undone."""
    needed, pending = set(), list(wanted)
    while pending:
        node = pending.pop()
        if node in needed:
            continue
        needed.add(node)
        pending.extend(AdaptedCall.of(node).tensors if node.target is ops.adapted else node.all_input_nodes)
    return needed


def _undone(graph: Graph, node: fx.Node, copies: Mapping[fx.Node, fx.Node], before: fx.Node) -> fx.Node:
    """A copy of a node of the base pass, its operands copies where there are some, put before ``before``."""
    if getattr(getattr(node.target, "_schema", None), "is_mutable", False):
        raise CompileError(
            f"a base pass cannot repeat {node.target}, which writes in place",
            next_step="switch the model's in-place operations (inplace=True) off",
        )
    with graph.fx.inserting_before(before):
        if node.target is not ops.adapted:
            return graph.fx.node_copy(node, lambda n: copies.get(n, n))
        call = AdaptedCall.of(node)
        plain = graph.fx.call_function(call.op, fx.map_arg(call.unadapted, lambda n: copies.get(n, n)))
    plain.meta = {**node.meta}
    return plain
