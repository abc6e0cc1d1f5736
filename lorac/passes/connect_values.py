"""values: branches get the program values that they read as operands (``lorac.ir.slots.program_values``).

Values that an adapter computes once per call are computed before the first branch that reads them, from separate slots.
Values of an earlier pass, of the base or of one adapter, are computed by a copy of the part of the graph on which they
depend (``lorac.passes.replay``).
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, fx

from lorac.errors import SiteError
from lorac.frontend.capture.decoder_families import find_sequence
from lorac.ir.graph import ops, segment_ops
from lorac.ir.graph.adapted_call import VALUE_PREFIX, AdaptedCall, add_operands, select_attention
from lorac.ir.graph.edit import inline, insert_call
from lorac.ir.graph.graph import Graph, Level, Skip
from lorac.ir.graph.passes import Pass, PassResult
from lorac.ir.sites.site import Site
from lorac.ir.slots.attention import FullAttention
from lorac.ir.slots.execution import FormulaContext, compute_once_values
from lorac.ir.slots.placed_execution import compute_once_in_places
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
from lorac.ir.slots.roles import branch_roles, slot_name
from lorac.passes.insert import add_slots, find_inputs
from lorac.passes.replay import IsolatedPass, Replay


@final
@dataclass(frozen=True)
class ConnectValues(Pass):
    """Add operands ``value:<name>`` to the adapted ops whose branches read values."""

    name: ClassVar[str] = "values"
    reads: ClassVar[Level] = Level.ADAPTED
    leaves: ClassVar[Level] = Level.ADAPTED

    def apply(self, graph: Graph) -> PassResult:
        """Add the operands; skip ops that already have them.

        Raises:
            SiteError: a value is not computed before the site that reads it, or the program has no such input or
                parameter.
            CompileError: an earlier pass would write in place.
        """
        found = {node: list_read_values([graph.plan_of(ops.site_of(node))]) for node in graph.find(ops.adapted)}
        reads = {node: names for node, names in found.items() if names}
        readers = {
            node: names
            for node, names in reads.items()
            if not {VALUE_PREFIX + name for name in names} <= AdaptedCall.of(node).operands.keys()
        }
        done = [ops.site_of(node) for node in reads if node not in readers]
        skipped = tuple(Skip(path, "it has its values already") for path in done)
        if not readers:
            return PassResult(changed=False, skipped=skipped)
        parsed = [(name, *parse_value_name(name)) for names in readers.values() for name in names]
        once_paths = dict.fromkeys(once_path_of(name) for name, kind, _ in parsed if kind == OWN)
        once = {path: graph.plans[path] for path in once_paths}
        parsed += [(name, *parse_value_name(name)) for name in list_read_values(once.values())]
        first, sources = next(iter(readers)), _ValueSources(graph)
        replay = Replay(graph, first, sources.order, sources.find_all)
        base_paths = [path for _, kind, path in parsed if kind == BASE]
        sources.base.update(_replay_modules(replay, sources.calls, base_paths, IsolatedPass()))
        _compute_once(sources, once, first, replay)
        for reader, names in readers.items():
            values = sources.find_all(names, reader)
            add_operands(reader, {VALUE_PREFIX + name: node for name, node in values.items()})
        return PassResult(changed=True, skipped=skipped)


@final
class _ValueSources:
    """The nodes of the values that branches read.

    Args:
        graph: at level adapted.

    Attributes:
        order: node -> its index in the graph.
        calls: module path -> its calls, in order.
        base: module path -> its last call in a pass of the base.
        own: full name of a value of ``once``, or of a value of an adapter's own pass -> its node.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph, self.order = graph, {node: i for i, node in enumerate(graph.fx.nodes)}
        self.calls: Mapping[str, Sequence[fx.Node]] = ops.group_calls(graph.find(*ops.SITE_CALLS))
        self.base: dict[str, fx.Node] = {}
        self.own: dict[str, fx.Node] = {}

    def find_all(self, names: Iterable[str], reader: fx.Node, path: str | None = None) -> dict[str, fx.Node]:
        """Return the nodes of the values that a call reads, by value name; ``path`` names the reader in errors."""
        found: dict[str, fx.Node] = {}
        for name in names:
            node = self._find(name, reader)
            if node is None:
                raise _missing_value(name, ops.site_of(reader) if path is None else path)
            found[name] = node
        return found

    def _find(self, name: str, reader: fx.Node) -> fx.Node | None:
        """Return the node of a value that a call reads; None if the value is not computed before the call."""
        kind, of = parse_value_name(name)
        if kind in {WEIGHT, PARAM}:  # the tensor may have several names
            stored = self.graph.sites[of].weight if kind == WEIGHT else of
            return next(map(self.graph.node, find_inputs(self.graph, stored)), None)
        if kind == INPUT:
            name = self.graph.interface.aliases.get(of, of)
            if name in self.graph.interface.inputs:
                return self.graph.node(name)
            inputs = {node.name: node for node in self.graph.placeholders()}
            sequence = find_sequence(inputs)
            if of != sequence.mask or isinstance(select_attention(self.graph), FullAttention):
                return None
            first = next(node for node in self.graph.fx.nodes if node.op != "placeholder")
            return insert_call(self.graph.exported, first, torch.ops.aten.ones_like.default, inputs[sequence.ids])
        if kind == BASE:
            return self.base.get(of)
        if kind in {OWN, PASS}:
            return self.own.get(name)
        found: Sequence[Any] = self.calls.get(of, ())
        if kind == IN:
            found = [AdaptedCall.of(call).x if call.target is ops.adapted else call.args[0] for call in found]
        before: list[fx.Node] = [node for node in found if self.order[node] < self.order[reader]]
        return before[-1] if before else None


def _replay_modules(
    replay: Replay, calls: Mapping[str, Sequence[fx.Node]], modules: Iterable[str], isolated: IsolatedPass
) -> dict[str, fx.Node]:
    """Compute the outputs of modules in an earlier pass; return their nodes by path."""
    latest = {path: calls[path][-1] for path in dict.fromkeys(modules) if path in calls}
    copies = replay.copy_nodes(latest.values(), isolated)
    return {path: copies.get(call, call) for path, call in latest.items()}


def _missing_value(name: str, path: str) -> SiteError:
    kind, of = parse_value_name(name)
    if kind in {OUTPUT, IN}:
        return SiteError(
            f"the value '{name}' is not computed before '{path}', which reads it",
            next_step=f"adapt later layers, or read 'base:{of}', its value in a pass of the unadapted model",
            code="site_unreached",
        )
    if kind == OWN:
        name = of.rpartition(".")[2]
        return SiteError(
            f"'{path}' reads 'own:{name}', which `once` of its method does not compute",
            next_step=f"have `once` return a tensor called '{name}', or leave it out of `reads`",
            code="site_not_found",
        )
    name = pass_value_name(pass_name_of(name).rpartition(".")[2], of) if kind == PASS else name
    return SiteError(
        f"the captured graph does not compute the value '{name}', which '{path}' reads",
        next_step="give example_inputs= that reach it",
        code="site_unreached",
    )


def _compute_once(sources: _ValueSources, once: Mapping[str, SitePlan], before: fx.Node, replay: Replay) -> None:
    """Insert the computation of the values of ``once``."""
    graph = sources.graph
    slots = add_slots(graph, once)
    branches = [(path, plan.site, i, branch) for path, plan in once.items() for i, branch in enumerate(plan.branches)]
    for path, site, i, branch in branches:
        _, *roles = branch_roles(i, len(branch.params))
        owner, names = owner_prefix(path, i), list[str]()
        for name, modules in modules_by_pass(branch.reads).items():
            outputs = _replay_modules(replay, sources.calls, modules, IsolatedPass(name, owner))
            named = {program_value_name(owner, pass_value_name(name, of)): node for of, node in outputs.items()}
            sources.own.update(named)
        read = sources.find_all([program_value_name(owner, name) for name in branch.reads], before, path)
        operands = [*(slots[slot_name(path, role)] for role in roles), *read.values()]
        context = functools.partial(FormulaContext, site, attention=select_attention(graph))
        function = functools.partial(_compute_values, context, branch, list(read), owner, graph.sites, names)
        _, nodes = inline(graph.exported, before, function, operands, in_places=branch.axes is not None)
        sources.own.update(zip(names, nodes, strict=True))


def _compute_values(
    context: Callable[..., FormulaContext],
    branch: BranchSlot,
    read: Sequence[str],
    owner: str,
    sites: Mapping[str, Site],
    names: list[str],
    *tensors: Tensor,
) -> tuple[Tensor, ...]:
    """Compute the values of an adapter's ``once``; set ``names`` to their names."""
    count = len(branch.params)
    values = present_weights(dict(zip(read, tensors[count:], strict=True)), sites)
    ctx = context(values=values)
    if branch.axes is None:
        found = compute_once_values(branch, tensors[:count], ctx, owner)
    else:
        found = compute_once_in_places(branch, tensors[:count], ctx, owner, segment_ops.SEGMENTS)
    names[:] = found
    return tuple(found.values())
