"""values: branches that read program values get them as operands (``lorac.ir.slots.program_values``).

What adapters compute once per call is computed here, before the first branch that reads it, from slots of its own.
What they read of passes before the call's own, the base's or one that they have to themselves, is computed by the part
of the captured graph that leads to it, once more (``lorac.passes.replay``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, fx

from lorac.errors import SiteError
from lorac.frontend.capture.attention_interface import list_derived_arguments
from lorac.ir.graph import ops
from lorac.ir.graph.adapted_call import VALUE_PREFIX, AdaptedCall, add_operands, select_attention
from lorac.ir.graph.attention_ops import find_token_input
from lorac.ir.graph.edit import inline, insert_call
from lorac.ir.graph.graph import Graph, Level
from lorac.ir.graph.passes import Pass, PassResult, Skip
from lorac.ir.interface import program_input_name
from lorac.ir.sites import Site
from lorac.ir.slots.attention import FullAttention
from lorac.ir.slots.execution import FormulaContext, compute_once_values
from lorac.ir.slots.plans import BranchSlot, SitePlan
from lorac.ir.slots.program_values import (
    BASE,
    IN,
    INPUT,
    OUTPUT,
    OWN,
    PARAM,
    PASS,
    WEIGHT,
    list_read_values,
    modules_by_pass,
    once_path_of,
    owner_prefix,
    parse_value_name,
    pass_name_of,
    pass_value_name,
    present_weights,
    program_value_name,
)
from lorac.ir.slots.roles import branch_name, parameter_role, slot_name
from lorac.passes.insert import add_slots
from lorac.passes.replay import IsolatedPass, Replay


@final
@dataclass(frozen=True)
class ConnectValues(Pass):
    """Add operands ``value:<name>`` to the adapted ops whose branches read values."""

    name: ClassVar[str] = "values"
    reads: ClassVar[Level] = Level.ADAPTED
    leaves: ClassVar[Level] = Level.ADAPTED

    def apply(self, graph: Graph) -> PassResult:
        """As the class says; skipped are the ops that have their values already.

        Raises:
            SiteError: a value is not computed before the site that reads it.
            SiteError: the program has no such input, or lacks the parameter.
            CompileError: a pass before the call's own would write in place.
        """
        found = {node: list_read_values([graph.plan_of(ops.site_of(node))]) for node in graph.find(ops.adapted)}
        reads = {node: names for node, names in found.items() if names}
        readers = {node: names for node, names in reads.items() if not _has(AdaptedCall.of(node), names)}
        if readers:
            _connect(graph, readers)
        given = [ops.site_of(node) for node in reads if node not in readers]
        return PassResult(bool(readers), tuple(Skip(path, "it has its values already") for path in given))


def _has(call: AdaptedCall, names: Iterable[str]) -> bool:
    return all(VALUE_PREFIX + name in call.operands for name in names)


@final
@dataclass(frozen=True)
class _ValueSources:
    """Where the values that branches read are computed.

    Attributes:
        graph: at level adapted.
        order: node -> its place in the graph.
        calls: module path -> its calls, in order.
        base: module path -> its last call, as a pass of the base computes it.
        own: full name of an own value, or of one of a pass of an adapter's own -> its node.
    """

    graph: Graph
    order: Mapping[fx.Node, int]
    calls: Mapping[str, Sequence[fx.Node]]
    base: dict[str, fx.Node]
    own: dict[str, fx.Node]

    def of(self, name: str, reader: fx.Node) -> fx.Node | None:
        """The node of the value called ``name`` for a call that reads it; None where it is not computed before that."""
        kind, of = parse_value_name(name)
        anywhere: dict[str, Callable[[], fx.Node | None]] = {
            WEIGHT: lambda: self._stored(self.graph.sites[of].weight),
            PARAM: lambda: self._stored(of),
            INPUT: lambda: self._input(of),
            BASE: lambda: self.base.get(of),
            OWN: lambda: self.own.get(name),
            PASS: lambda: self.own.get(name),
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
        found = program_input_name(argument)
        return self.graph.node(found) if found in names and found not in slots else self._made(argument)

    def _made(self, argument: str) -> fx.Node | None:
        """What the trace of a text that grows made by itself: its mask, by which nothing of it is padding."""
        inputs = {node.name: node for node in self.graph.placeholders()}
        text = find_token_input(inputs)
        if argument != list_derived_arguments(text)[0] or isinstance(select_attention(self.graph), FullAttention):
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
    parsed = [(name, *parse_value_name(name)) for names in readers.values() for name in names]
    once = {
        path: graph.plans[path] for path in dict.fromkeys(once_path_of(name) for name, kind, _ in parsed if kind == OWN)
    }
    before = [(name, *parse_value_name(name)) for name in list_read_values(once.values())]
    first = next(iter(readers))
    sources = _ValueSources(graph, order, calls, {}, {})
    again = Replay(graph, first, order, lambda names, reader: _found(sources, names, reader))
    wanted = [path for _, kind, path in (*parsed, *before) if kind == BASE]
    sources.base.update(_passed(again, calls, wanted, IsolatedPass()))
    _compute_once(sources, once, first, again)
    for reader, names in readers.items():
        _hand(reader, _found(sources, names, reader))


def _passed(
    again: Replay, calls: Mapping[str, Sequence[fx.Node]], wanted: Iterable[str], alone: IsolatedPass
) -> dict[str, fx.Node]:
    """Path of a module -> its output in a pass before the call's own, where the graph calls it."""
    latest = {path: calls[path][-1] for path in dict.fromkeys(wanted) if path in calls}
    copies = again.copies(latest.values(), alone)
    return {path: copies.get(call, call) for path, call in latest.items()}


def _found(
    sources: _ValueSources, names: Iterable[str], reader: fx.Node, path: str | None = None
) -> dict[str, fx.Node]:
    """Name -> node of what is read at a site, be it called ``path``."""
    found: dict[str, fx.Node] = {}
    for name in names:
        node = sources.of(name, reader)
        if node is None:
            raise _missing(name, ops.site_of(reader) if path is None else path)
        found[name] = node
    return found


def _missing(name: str, path: str) -> SiteError:
    kind, of = parse_value_name(name)
    if kind in {OUTPUT, IN}:
        return SiteError(
            f"the value '{name}' is not computed before '{path}', which reads it",
            next_step=f"'base:{of}' reads it from a pass of the unadapted model",
            code="site_unreached",
        )
    if kind == OWN:
        told = of.rpartition(".")[2]
        return SiteError(
            f"'{path}' reads 'own:{told}', which `once` of its method does not compute",
            next_step=f"have `once` answer a tensor called '{told}', or leave it out of `reads`",
            code="site_not_found",
        )
    told = pass_value_name(pass_name_of(name).rpartition(".")[2], of) if kind == PASS else name
    return SiteError(
        f"the captured graph does not compute the value '{told}', which '{path}' reads",
        next_step="give example_inputs= that reach it",
        code="site_unreached",
    )


def _compute_once(sources: _ValueSources, once: Mapping[str, SitePlan], before: fx.Node, again: Replay) -> None:
    """Have the graph compute what adapters compute once per call, and note where."""
    graph = sources.graph
    slots = add_slots(graph, once)
    for path, plan in once.items():
        for i, branch in enumerate(plan.branches):
            roles = [parameter_role(branch_name(i), j) for j in range(len(branch.params))]
            owner, names = owner_prefix(path, i), list[str]()
            _pass_alone(sources, again, owner, branch)
            read = _found(sources, [program_value_name(owner, name) for name in branch.reads], before, path)
            operands = [*(slots[slot_name(path, role)] for role in roles), *read.values()]
            around = functools.partial(FormulaContext, plan.site, attention=select_attention(graph))
            function = functools.partial(_own_values, around, branch, list(read), owner, graph.sites, names)
            _, nodes = inline(graph.exported, before, function, operands)
            sources.own.update(zip(names, nodes, strict=True))


def _pass_alone(sources: _ValueSources, again: Replay, owner: str, branch: BranchSlot) -> None:
    """Have the graph compute what an adapter reads of passes that it has to itself, and note where."""
    for name, modules in modules_by_pass(branch.reads).items():
        passed = _passed(again, sources.calls, modules, IsolatedPass(name, owner))
        sources.own.update({program_value_name(owner, pass_value_name(name, of)): node for of, node in passed.items()})


def _own_values(
    around: Callable[..., FormulaContext],
    branch: BranchSlot,
    read: Sequence[str],
    owner: str,
    sites: Mapping[str, Site],
    names: list[str],
    *tensors: Tensor,
) -> tuple[Tensor, ...]:
    """What one adapter computes once, of its parameters and of what it reads; ``names`` gets what each is called."""
    count = len(branch.params)
    values = present_weights(dict(zip(read, tensors[count:], strict=True)), sites)
    found = compute_once_values(branch, tensors[:count], around(values=values), owner)
    names[:] = found
    return tuple(found.values())


def _hand(reader: fx.Node, found: Mapping[str, fx.Node]) -> None:
    add_operands(reader, {VALUE_PREFIX + name: node for name, node in found.items()})


def _calls(graph: Graph) -> dict[str, list[fx.Node]]:
    """Site path -> its calls, in order."""
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.find(*ops.SITE_CALLS):
        calls.setdefault(ops.site_of(node), []).append(node)
    return calls
