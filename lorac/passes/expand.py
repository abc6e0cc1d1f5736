"""expand: adapted ops become aten ops in their normal form, and the ops of other sites their aten ops."""

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, final

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
"""The operands of a branch that have a row for each of the batch: a site's input, its output, and that of the base."""


@final
@dataclass(frozen=True)
class ExpandAdaptedCalls(Pass):
    """adapted -> expanded. An adapted op becomes a trace of ``run_site``, one for each structure.

    Attributes:
        aux: names of the extra outputs, which branches emit.
    """

    name: ClassVar[str] = "expand"
    reads: ClassVar[Level] = Level.ADAPTED
    leaves: ClassVar[Level] = Level.EXPANDED
    aux: tuple[str, ...] = ()

    def apply(self, graph: Graph) -> PassResult:
        """Expand the ops; skip an extra output that no branch of this graph emits."""
        adapted, expander = list(graph.find(ops.adapted)), _Expander(graph, self.aux, select_attention(graph))
        for node in adapted:
            expander.expand(node)
        extra = expander.extra
        _share_cuts(graph)
        for cut in graph.find(segment_ops.CUT):
            graph.axes.setdefault(str(cut.meta["val"].shape[1]), f"segment_{len(graph.axes)}")
        lowered = ops.lower_sites(graph.exported.graph_module)
        if extra:
            graph.add_outputs(extra)
        emitted = {name.partition(":")[0] for name in extra}
        skips = [Skip(name, "no branch at a site of this graph emits it") for name in self.aux if name not in emitted]
        return PassResult(bool(adapted) or lowered, tuple(skips))


@dataclass(frozen=True)
class _Expander:
    """Replaces the adapted ops of a graph.

    Attributes:
        aux: names of the extra outputs.
        traces: the traces of sites by their structure.
        extra: extra output by its name in the program -> its node.
    """

    graph: Graph
    aux: tuple[str, ...]
    attention: BranchAttention
    traces: dict[object, fx.GraphModule] = field(default_factory=dict)
    extra: dict[str, fx.Node] = field(default_factory=dict)

    def expand(self, node: fx.Node) -> None:
        """Replace an adapted op by the ops of its site's normal form."""
        call, plan = AdaptedCall.of(node), self.graph.plan_of(ops.site_of(node))
        if plan.has_placed_branches:
            self._expand_placed_branches(node, call, plan)
        else:
            self._expand_whole(node, call, plan, self.aux)

    def _expand_placed_branches(self, node: fx.Node, call: AdaptedCall, plan: SitePlan) -> None:
        """Expand a call whose rows may have branches of their own: first the site without them, then each by itself."""
        graph = self.graph
        with graph.fx.inserting_before(node):
            base = y = graph.fx.call_function(call.op, call.unadapted)
        base.meta = {**node.meta}
        if not plan.without_branches.empty:
            weights = without_branches(call)
            y = self._expand_whole(weights.insert_before(graph.fx, node), weights, plan.without_branches, ())
        for index, slot in enumerate(plan.branches):
            operands = select_operands(plan, index, call)
            emits = [name for name in slot.emits if name in self.aux]
            inputs, readers = [call.x, y, base, *operands.values()], set[str]()
            compute = functools.partial(compute_placed_branch, plan, index)

            def function(x: Tensor, y: Tensor, base: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
                given = dict(zip(operands, tensors, strict=True))  # noqa: B023  (traced at once)
                make, emitted = self._prepare_context(readers)  # noqa: B023  (traced at once)
                changed = compute((x, y, base), given, graph.sites, make)  # noqa: B023  (traced at once)
                return (changed, *(emitted[name][0] for name in emits))  # noqa: B023  (traced at once)

            key = (
                slot.structure,
                tuple(emits),
                tuple(operands),
                _describe_site(plan.site),
                *(describe_type(get_example(operand)) for operand in inputs),
            )
            known = self.traces.get(key)
            if known is None:
                known = _simplify_differences(trace_in_places(graph.exported, function, inputs), [_ROWS])
                self._keep_trace(key, known, readers)
            _, (y, *others) = inline(graph.exported, node, function, inputs, known)
            self.extra.update({_extra_name(name, plan, index): o for name, o in zip(emits, others, strict=True)})
        graph.replace_node(node, y)

    def _expand_whole(self, node: fx.Node, call: AdaptedCall, plan: SitePlan, aux: tuple[str, ...]) -> fx.Node:
        exported, operands = self.graph.exported, call.tensors
        readers = set[str]()
        emits = [(name, i) for i, branch in enumerate(plan.branches) for name in branch.emits if name in aux]

        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            given = dict(zip(call.operands, tensors[len(operands) :], strict=True))
            make, emitted = self._prepare_context(readers)
            own = replace(call, host=tensors[: len(operands)], operands=given)
            y = compute_adapted(plan, own, self.graph.sites, make)
            return (y, *(emitted[name].pop(0) for name, _ in emits))

        inputs = [*operands, *call.operands.values()]
        shapes = (tuple(map(str, n.meta["val"].shape[:-1])) for n in operands[:1])
        key = (call.op, len(operands), tuple(call.operands), _describe_structure(plan, call), *shapes)
        known = self.traces.get(key)
        if known is None and plan.branches:
            strengths = [len(operands) + i for i, role in enumerate(call.operands) if is_strength(role)]
            known = _simplify_differences(trace_function(exported, function, inputs), strengths)
        traced, (y, *others) = inline(exported, node, function, inputs, known)
        self._keep_trace(key, traced, readers)
        self.graph.replace_node(node, y)
        self.extra.update(zip((_extra_name(name, plan, i) for name, i in emits), others, strict=True))
        return y

    def _prepare_context(self, readers: set[str]) -> tuple[MakeContext, dict[str, list[Tensor]]]:
        """Return what makes the contexts of one run of branches, and what will hold their extra outputs.

        Args:
            readers: filled with the paths of sites that formulas read.
        """
        emitted: dict[str, list[Tensor]] = {}
        context = functools.partial(FormulaContext, emitted=emitted, attention=self.attention, site_readers=readers)
        return context, emitted

    def _keep_trace(self, key: object, traced: fx.GraphModule, readers: Collection[str]) -> None:
        """Keep a trace for other sites, unless a formula in it reads what its site is."""
        if not readers:
            self.traces.setdefault(key, traced)


def _share_cuts(graph: Graph) -> None:
    """Let all sites that read a value share its segments, and all cuts read the number of places from one slot."""
    known: dict[object, fx.Node] = {}
    for cut in graph.find(segment_ops.CUT):
        x, _, features = cut.args
        first = known.setdefault((x, features), cut)
        if first is cut:
            cut.args = (x, next(iter(known.values())).args[1], features)
        else:
            graph.replace_node(cut, first)


def _simplify_differences(traced: fx.GraphModule, strengths: Sequence[int]) -> fx.GraphModule:
    """Replace y' − y by m for branches that end in y' = y + m, which saves two ops as long as y at each site.

    Args:
        traced: edited in place.
        strengths: the operands that are strengths, by which such a difference is multiplied.
    """
    places = [node for node in traced.graph.nodes if node.op == "placeholder"]
    for scaled in [user for index in strengths for user in places[index].users]:
        found = map(_behind_segments, scaled.all_input_nodes)
        moved = next((operand for operand in found if operand.target is aten.sub.Tensor), None)
        summed = None if moved is None else moved.args[0]
        if moved is None or not isinstance(summed, fx.Node) or summed.target is not aten.add.Tensor:
            continue
        if moved.kwargs or summed.kwargs:
            continue
        others = [operand for operand in summed.args if operand is not moved.args[1]]
        if len(others) == 1 and isinstance(others[0], fx.Node) and have_equal_types(others[0], moved):
            moved.replace_all_uses_with(others[0])
    traced.graph.eliminate_dead_code()
    return traced


def _behind_segments(node: fx.Node) -> fx.Node:
    """Return the node whose value a node has, in whatever segments."""
    while node.target in {segment_ops.CUT, segment_ops.JOIN}:
        node = node.args[0]  # type: ignore[assignment]  # a node
    return node


def _describe_structure(plan: SitePlan, call: AdaptedCall) -> tuple[object, ...]:
    """Return a key that is equal for sites that one trace serves."""
    free = plan.ranks is not RankPolicy.FIXED
    rooms = ((role.name, 1 if role.ranked and free else room) for role, room in plan.roles())
    branches = ((slot.structure, slot.emits) for slot in plan.branches)
    of_branches = (describe_type(get_example(operand)) for role, operand in call.operands.items() if role not in ROLES)
    return (*_describe_site(plan.site), plan.placed, *rooms, *branches, *of_branches)


def _describe_site(site: Site) -> tuple[object, ...]:
    shape = (site.kind, site.out_features, site.in_features, site.transposed, site.conv, site.padding_idx)
    return (*shape, site.bias is not None)


def _extra_name(name: str, plan: SitePlan, index: int) -> str:
    """Return the name of a branch's extra output in the program."""
    return f"{name}:{slot_name(plan.site.path, branch_name(index))}"
