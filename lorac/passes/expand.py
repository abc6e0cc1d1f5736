"""expand: adapted ops become aten ops in normal form; ops of all other sites become their aten ops."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor, fx

from lorac.ir.graph import ops, segment_ops
from lorac.ir.graph.adapted_call import (
    AdaptedCall,
    MakeContext,
    compute_adapted,
    compute_placed_branch,
    select_attention,
    select_operands,
    without_branches,
)
from lorac.ir.graph.edit import have_equal_types, inline, trace_function, trace_in_places
from lorac.ir.graph.graph import Graph, Level, Skip
from lorac.ir.graph.nodes import describe_type, get_example
from lorac.ir.graph.passes import Pass, PassResult
from lorac.ir.sites.site import Site
from lorac.ir.slots.attention import BranchAttention
from lorac.ir.slots.execution import FormulaContext
from lorac.ir.slots.plans import RankPolicy, SitePlan
from lorac.ir.slots.roles import ROLES, branch_name, is_strength, slot_name

aten = torch.ops.aten
_ROWS = 3
"""The number of a branch's operands that have the batch's rows: the site's input, its output, and its base output."""


@final
@dataclass(frozen=True)
class ExpandAdaptedCalls(Pass):
    """adapted -> expanded. An adapted op becomes a trace of ``run_site``; ops of equal structure share a trace.

    Attributes:
        aux: names of the extra outputs, which branches emit.
    """

    name: ClassVar[str] = "expand"
    reads: ClassVar[Level] = Level.ADAPTED
    leaves: ClassVar[Level] = Level.EXPANDED
    aux: tuple[str, ...] = ()

    def apply(self, graph: Graph) -> PassResult:
        """Expand the ops; report an extra output that no branch of this graph emits as skipped."""
        adapted, expander = list(graph.find(ops.adapted)), _Expander(graph, self.aux)
        for node in adapted:
            expander.expand(node)
        extra = expander.extra
        # Each value is cut once for all sites that read it, and one slot gives the number of places.
        known: dict[object, fx.Node] = {}
        for cut in list(graph.find(segment_ops.CUT)):
            x, _, features = cut.args
            first = known.setdefault((x, features), cut)
            if first is cut:
                cut.args = (x, next(iter(known.values())).args[1], features)
            else:
                graph.replace_node(cut, first)
        for cut in graph.find(segment_ops.CUT):
            graph.axes.setdefault(str(cut.meta["val"].shape[1]), f"segment_{len(graph.axes)}")
        lowered = ops.lower_sites(graph.exported.graph_module)
        if extra:
            graph.add_outputs(extra)
        emitted = {name.partition(":")[0] for name in extra}
        skips = [Skip(name, "no branch at a site of this graph emits it") for name in self.aux if name not in emitted]
        return PassResult(bool(adapted) or lowered, tuple(skips))


@dataclass(frozen=True, eq=False)
class PlacedBranch:
    """A branch of a site whose slots have places, as a function of tensors: (site's output, extra outputs…).

    Attributes:
        plan: the site's slots.
        index: index of the branch in the plan.
        roles: roles of the branch's operands (``select_operands``).
        emits: names of the branch's extra outputs.
        sites: every site, for the layouts of the values that it reads.
        attention: the attention of branches.
        readers: set to which the path of the site is added if the formula reads its site.
    """

    plan: SitePlan
    index: int
    roles: Sequence[str]
    emits: Sequence[str]
    sites: Mapping[str, Site]
    attention: BranchAttention
    readers: set[str] = field(default_factory=set)

    def __call__(self, x: Tensor, y: Tensor, base: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        emitted: dict[str, list[Tensor]] = {}
        context = _make_context(self, emitted)
        operands = dict(zip(self.roles, tensors, strict=True))
        changed = compute_placed_branch(self.plan, self.index, (x, y, base), operands, self.sites, context)
        return (changed, *(emitted[name][0] for name in self.emits))


@dataclass(frozen=True, eq=False)
class AdaptedSite:
    """A call of an adapted site as a function of its tensors: (site's output, extra outputs…).

    Attributes:
        call: the call.
        emits: names of the site's extra outputs, branch by branch.
        plan, sites, attention, readers: as in ``PlacedBranch``.
    """

    plan: SitePlan
    call: AdaptedCall
    emits: Sequence[str]
    sites: Mapping[str, Site]
    attention: BranchAttention
    readers: set[str] = field(default_factory=set)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        emitted: dict[str, list[Tensor]] = {}
        context = _make_context(self, emitted)
        count = len(self.call.tensors)
        operands = dict(zip(self.call.operands, tensors[count:], strict=True))
        call = replace(self.call, host=tensors[:count], operands=operands)
        y = compute_adapted(self.plan, call, self.sites, context)
        return (y, *(emitted[name].pop(0) for name in self.emits))


def _make_context(function: PlacedBranch | AdaptedSite, emitted: dict[str, list[Tensor]]) -> MakeContext:
    return functools.partial(
        FormulaContext, emitted=emitted, attention=function.attention, site_readers=function.readers
    )


class _Expander:
    """An expander of the adapted ops of a graph.

    Args:
        graph: edited in place.
        aux: names of the extra outputs.

    Attributes:
        extra: extra output by its name in the program -> its node.
    """

    def __init__(self, graph: Graph, aux: tuple[str, ...]) -> None:
        self._graph, self._aux, self._attention = graph, aux, select_attention(graph)
        self._traces: dict[object, fx.GraphModule] = {}
        self.extra: dict[str, fx.Node] = {}

    def expand(self, node: fx.Node) -> None:
        """Replace an adapted op by the ops of its site's normal form.

        If rows may have different branches, the site without branches comes first, then each branch separately.
        """
        call, plan, graph = AdaptedCall.of(node), self._graph.plan_of(ops.site_of(node)), self._graph
        if not plan.has_placed_branches:
            self._expand_site(node, call, plan, self._aux)
            return
        with graph.fx.inserting_before(node):
            base = y = graph.fx.call_function(call.op, call.unadapted)
        base.meta = {**node.meta}
        if not plan.without_branches.empty:
            weights = without_branches(call)
            y = self._expand_site(weights.insert_before(graph.fx, node), weights, plan.without_branches, ())
        for index, slot in enumerate(plan.branches):
            operands = select_operands(plan, index, call)
            emits = [name for name in slot.emits if name in self._aux]
            branch = PlacedBranch(plan, index, list(operands), emits, graph.sites, self._attention)
            inputs = [call.x, y, base, *operands.values()]
            types = (describe_type(get_example(operand)) for operand in inputs)
            key = (slot.structure, tuple(emits), tuple(operands), _describe_site(plan.site), *types)
            y = self._insert(node, branch, inputs, key, [_ROWS], [(name, index) for name in emits])
        graph.replace_node(node, y)

    def _expand_site(self, node: fx.Node, call: AdaptedCall, plan: SitePlan, aux: tuple[str, ...]) -> fx.Node:
        emits = [(name, i) for i, branch in enumerate(plan.branches) for name in branch.emits if name in aux]
        site = AdaptedSite(plan, call, [name for name, _ in emits], self._graph.sites, self._attention)
        any_rank = plan.ranks is not RankPolicy.FIXED
        key = (
            (call.op, len(call.tensors), tuple(call.operands), _describe_site(plan.site), plan.placed),
            *((role.name, 1 if role.ranked and any_rank else room) for role, room in plan.roles()),
            *((slot.structure, slot.emits) for slot in plan.branches),
            *(describe_type(get_example(operand)) for role, operand in call.operands.items() if role not in ROLES),
            *(tuple(map(str, get_example(x).shape[:-1])) for x in call.tensors[:1]),
        )
        strengths = [len(call.tensors) + i for i, role in enumerate(call.operands) if is_strength(role)]
        y = self._insert(node, site, [*call.tensors, *call.operands.values()], key, strengths, emits)
        self._graph.replace_node(node, y)
        return y

    def _insert(
        self,
        node: fx.Node,
        function: PlacedBranch | AdaptedSite,
        inputs: Sequence[fx.Node],
        key: object,
        strengths: Sequence[int],
        emits: Sequence[tuple[str, int]],
    ) -> fx.Node:
        """Insert a function's ops before a node; return the node of the site's output.

        Args:
            node: the adapted op.
            function: traced here, unless a function with an equal key was traced before.
            inputs: the function's operands.
            key: functions with equal keys share a trace, unless a formula reads its site.
            strengths: indices of the strengths among the operands.
            emits: the extra outputs, each with the index of the branch that emits it.
        """
        program, traced = self._graph.exported, self._traces.get(key)
        if traced is None:
            trace = trace_in_places if isinstance(function, PlacedBranch) else trace_function
            traced = _simplify_differences(trace(program, function, inputs), strengths)
            if not function.readers:
                self._traces[key] = traced
        _, (y, *others) = inline(program, node, function, inputs, traced)
        for (name, index), output in zip(emits, others, strict=True):
            self.extra[f"{name}:{slot_name(function.plan.site.path, branch_name(index))}"] = output
        return y


def _simplify_differences(traced: fx.GraphModule, strengths: Sequence[int]) -> fx.GraphModule:
    """Replace y' − y by m where a branch ends in y' = y + m, which saves two ops of y's size per site.

    Args:
        traced: edited in place.
        strengths: indices of the operands that are strengths, by which such differences are multiplied.
    """
    places = [node for node in traced.graph.nodes if node.op == "placeholder"]
    for scaled in [user for index in strengths for user in places[index].users]:
        moved: Any = None
        for operand in scaled.all_input_nodes:
            moved = operand
            while moved.target in {segment_ops.CUT, segment_ops.JOIN}:
                moved = moved.args[0]
            if moved.target is aten.sub.Tensor:
                break
        else:
            continue
        summed = moved.args[0]
        if not isinstance(summed, fx.Node) or summed.target is not aten.add.Tensor:
            continue
        if moved.kwargs or summed.kwargs:
            continue
        others = [operand for operand in summed.args if operand is not moved.args[1]]
        if len(others) == 1 and isinstance(others[0], fx.Node) and have_equal_types(others[0], moved):
            moved.replace_all_uses_with(others[0])
    traced.graph.eliminate_dead_code()
    return traced


def _describe_site(site: Site) -> tuple[object, ...]:
    shape = (site.kind, site.out_features, site.in_features, site.transposed, site.conv, site.padding_idx)
    return (*shape, site.bias is not None)
