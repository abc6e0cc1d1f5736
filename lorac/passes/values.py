"""values: branches that read program values get them as operands (``lorac.ir.slots.reads``).

What adapters compute once per call is computed here, before the first branch that reads it, from slots of its own.
A base pass is the part of the captured graph that leads to the value, copied with every adapted op undone. What no
adapted op reaches is not copied but shared with the pass that reads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, fx

from lorac.errors import CompileError, SiteError, SiteNotFound, SiteUnreached
from lorac.ir.capture.attention import made_of
from lorac.ir.graph import ops
from lorac.ir.graph.adapted import VALUE_ROLE, AdaptedCall, attention_in, give
from lorac.ir.graph.attending import text_of
from lorac.ir.graph.edit import inline, insert_call
from lorac.ir.graph.graph import Graph, Level
from lorac.ir.graph.passes import Outcome, Pass, Skip
from lorac.ir.graph.signature import in_program
from lorac.ir.host.sites import Site
from lorac.ir.slots.attention import WholeText
from lorac.ir.slots.reads import (
    BASE,
    IN,
    INPUT,
    OUTPUT,
    OWN,
    PARAM,
    WEIGHT,
    names_read,
    once_of,
    owner_at,
    parse,
    presented,
)
from lorac.ir.slots.roles import branch_name, parameter_role, slot_name
from lorac.ir.slots.run import Ctx, own_values
from lorac.ir.slots.site import BranchSlot, SitePlan
from lorac.passes.insert import add_slots


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
            SiteNotFound: the program has no such input, or lacks the parameter.
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
        calls: module path -> its calls, in order.
        base: module path -> its last call, as a pass of the base computes it.
        own: full name of an own value -> its node.
    """

    graph: Graph
    order: Mapping[fx.Node, int]
    calls: Mapping[str, Sequence[fx.Node]]
    base: Mapping[str, fx.Node]
    own: dict[str, fx.Node]

    def of(self, name: str, reader: fx.Node) -> fx.Node | None:
        """The node of the value called ``name`` for a call that reads it; None where it is not computed before that."""
        kind, of = parse(name)
        anywhere: dict[str, Callable[[], fx.Node | None]] = {
            WEIGHT: lambda: self._stored(self.graph.sites[of].weight),
            PARAM: lambda: self._stored(of),
            INPUT: lambda: self._input(of),
            BASE: lambda: self.base.get(of),
            OWN: lambda: self.own.get(name),
        }
        if kind in anywhere:
            return anywhere[kind]()
        found = [_taken_by(call) if kind == IN else call for call in self.calls.get(of, ())]
        before = [node for node in found if self.order[node] < self.order[reader]]
        return before[-1] if before else None

    def _stored(self, wanted: str | None) -> fx.Node | None:
        """Through which node the graph reads a parameter or buffer, by one of the names it goes by."""
        signature, held = self.graph.exported.graph_signature, self.graph.exported.state_dict
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        tensor = held.get(str(wanted))
        same = (
            name for name, fqn in names.items() if fqn == wanted or (tensor is not None and held.get(fqn) is tensor)
        )
        return next((self.graph.node(name) for name in same), None)

    def _input(self, argument: str) -> fx.Node | None:
        """The input that an argument of forward became."""
        names, slots = self.graph.exported.graph_signature.user_inputs, {s.node for s in self.graph.slots.values()}
        found = in_program(argument)
        return self.graph.node(found) if found in names and found not in slots else self._made(argument)

    def _made(self, argument: str) -> fx.Node | None:
        """What the trace of a text that grows made by itself: its mask, by which nothing of it is padding."""
        inputs = {node.name: node for node in self.graph.placeholders()}
        text = text_of(inputs)
        if argument != made_of(text)[0] or isinstance(attention_in(self.graph), WholeText):
            return None
        first = next(node for node in self.graph.fx.nodes if node.op != "placeholder")
        return insert_call(self.graph.exported, first, torch.ops.aten.ones_like.default, inputs[text])


def _taken_by(call: fx.Node) -> fx.Node:
    """What a call of a site takes."""
    taken = AdaptedCall.of(call).x if call.target is ops.adapted else call.args[0]
    assert isinstance(taken, fx.Node)
    return taken


def _connect(graph: Graph, readers: Mapping[fx.Node, Collection[str]]) -> None:
    """Find what each of the readers reads, by name, and hand it over."""
    order = {node: i for i, node in enumerate(graph.fx.nodes)}
    calls = _calls(graph)
    parsed = [(name, *parse(name)) for names in readers.values() for name in names]
    once = {path: graph.plans[path] for path in dict.fromkeys(once_of(name) for name, kind, _ in parsed if kind == OWN)}
    before = [(name, *parse(name)) for name in names_read(once.values())]
    wanted = {path for _, kind, path in (*parsed, *before) if kind == BASE}
    latest = {path: calls[path][-1] for path in wanted if path in calls}
    first = next(iter(readers))
    copies = _base_pass(graph, latest.values(), first, order)
    base = {path: copies.get(call, call) for path, call in latest.items()}
    sources = _Sources(graph, order, calls, base, {})
    _compute_once(sources, once, first)
    for reader, names in readers.items():
        _hand(reader, _found(sources, names, reader))


def _found(sources: _Sources, names: Iterable[str], reader: fx.Node, path: str | None = None) -> dict[str, fx.Node]:
    """Name -> node of what is read at a site, be it called ``path``."""
    found: dict[str, fx.Node] = {}
    for name in names:
        node = sources.of(name, reader)
        if node is None:
            raise _missing(name, ops.site_of(reader) if path is None else path)
        found[name] = node
    return found


def _missing(name: str, path: str) -> SiteError:
    kind, of = parse(name)
    if kind in {OUTPUT, IN}:
        return SiteUnreached(
            f"the value '{name}' is not computed before '{path}', which reads it",
            next_step=f"'base:{of}' reads it from a pass of the unadapted model",
        )
    if kind == OWN:
        told = of.rpartition(".")[2]
        return SiteNotFound(
            f"'{path}' reads 'own:{told}', which `once` of its method does not compute",
            next_step=f"have `once` answer a tensor called '{told}', or leave it out of `reads`",
        )
    return SiteUnreached(
        f"the captured graph does not compute the value '{name}', which '{path}' reads",
        next_step="give example_inputs= that reach it",
    )


def _compute_once(sources: _Sources, once: Mapping[str, SitePlan], before: fx.Node) -> None:
    """Have the graph compute what adapters compute once per call, and note where."""
    graph = sources.graph
    slots = add_slots(graph, once)
    for path, plan in once.items():
        for i, branch in enumerate(plan.branches):
            roles = [parameter_role(branch_name(i), j) for j in range(len(branch.params))]
            read = _found(sources, branch.reads, before, path)
            operands = [*(slots[slot_name(path, role)] for role in roles), *read.values()]
            owner, names = owner_at(path, i), list[str]()
            around = functools.partial(Ctx, plan.site, attention=attention_in(graph))
            function = functools.partial(_own_values, around, branch, list(read), owner, graph.sites, names)
            _, nodes = inline(graph.exported, before, function, operands)
            sources.own.update(zip(names, nodes, strict=True))


def _own_values(
    around: Callable[..., Ctx],
    branch: BranchSlot,
    read: Sequence[str],
    owner: str,
    sites: Mapping[str, Site],
    names: list[str],
    *tensors: Tensor,
) -> tuple[Tensor, ...]:
    """What one adapter computes once, of its parameters and of what it reads; ``names`` gets what each is called."""
    count = len(branch.params)
    values = presented(dict(zip(read, tensors[count:], strict=True)), sites)
    found = own_values(branch, tensors[:count], around(values=values), owner)
    names[:] = found
    return tuple(found.values())


def _hand(reader: fx.Node, found: Mapping[str, fx.Node]) -> None:
    give(reader, {VALUE_ROLE + name: node for name, node in found.items()})


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
