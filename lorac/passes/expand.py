"""expand: adapted ops become aten ops in their normal form; the other sites become the aten ops they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import fx

from lorac.ir.graph import ops
from lorac.ir.graph.adapted_call import AdaptedCall, compute_adapted, select_attention
from lorac.ir.graph.edit import inline, trace_function
from lorac.ir.graph.graph import Graph, Level
from lorac.ir.graph.passes import Pass, PassResult, Skip
from lorac.ir.sites import Site
from lorac.ir.slots.attention import BranchAttention
from lorac.ir.slots.plans import RankPolicy, SitePlan
from lorac.ir.slots.roles import branch_name, is_strength, slot_name

Tensor = torch.Tensor
aten = torch.ops.aten


@final
@dataclass(frozen=True)
class ExpandAdaptedCalls(Pass):
    """adapted -> expanded. The meaning of an adapted op is ``run_site``, traced once per structure.

    Attributes:
        aux: names of extra outputs to give (what branches emit).
    """

    name: ClassVar[str] = "expand"
    reads: ClassVar[Level] = Level.ADAPTED
    leaves: ClassVar[Level] = Level.EXPANDED
    aux: tuple[str, ...] = ()

    def apply(self, graph: Graph) -> PassResult:
        """As the class says; skipped is an extra output that nothing in this graph gives."""
        traces: dict[Any, fx.GraphModule] = {}
        extra: dict[str, fx.Node] = {}
        adapted, attention = list(graph.find(ops.adapted)), select_attention(graph)
        for node in adapted:
            _expand_one(graph, node, traces, self.aux, extra, attention)
        lowered = ops.lower_sites(graph.exported.graph_module)
        if extra:
            graph.add_outputs(extra)
        given = {name.partition(":")[0] for name in extra}
        unmet = [Skip(name, "no branch at a site of this graph emits it") for name in self.aux if name not in given]
        return PassResult(bool(adapted) or lowered, tuple(unmet))


def _expand_one(
    graph: Graph,
    node: fx.Node,
    traces: dict[Any, fx.GraphModule],
    aux: tuple[str, ...],
    extra: dict[str, fx.Node],
    attention: BranchAttention,
) -> None:
    call = AdaptedCall.of(node)
    plan, operands = graph.plan_of(call.site), call.tensors
    function, emitted = _meaning(graph.sites, plan, call, aux, attention)
    inputs = [*operands, *call.operands.values()]
    shapes = (tuple(map(str, n.meta["val"].shape[:-1])) for n in operands[:1])
    key = (call.op, tuple(call.operands), _structure(plan), *shapes)
    known = traces.get(key)
    if has_own_trace(plan):
        strengths = [len(operands) + i for i, role in enumerate(call.operands) if is_strength(role)]
        known = _shortened(trace_function(graph.exported, function, inputs), strengths)
    traced, outputs = inline(graph.exported, node, function, inputs, known)
    traces.setdefault(key, traced)
    node.replace_all_uses_with(outputs[0])
    graph.fx.erase_node(node)
    for name, output in zip(emitted, outputs[1:], strict=True):
        extra[name] = output


def _shortened(traced: fx.GraphModule, strengths: Sequence[int]) -> fx.GraphModule:
    """A trace in which y' − y is m for branches that end in y' = y + m: as long as y, that is two ops less a site.

    Args:
        traced: edited in place.
        strengths: which of its operands are strengths, by which such a difference is multiplied.
    """
    places = [node for node in traced.graph.nodes if node.op == "placeholder"]
    for scaled in [user for index in strengths for user in places[index].users]:
        moved: Any = next((operand for operand in scaled.all_input_nodes if operand.target is aten.sub.Tensor), None)
        summed: Any = None if moved is None else moved.args[0]
        if not isinstance(summed, fx.Node) or summed.target is not aten.add.Tensor or moved.kwargs or summed.kwargs:
            continue
        others = [operand for operand in summed.args if operand is not moved.args[1]]
        if len(others) == 1 and isinstance(others[0], fx.Node) and _alike(others[0], moved):
            moved.replace_all_uses_with(others[0])
    traced.graph.eliminate_dead_code()
    return traced


def _alike(node: fx.Node, other: fx.Node) -> bool:
    """Whether two values have one shape and dtype, as far as they are known."""
    a, b = node.meta["val"], other.meta["val"]
    return bool(a.dtype == b.dtype and [str(size) for size in a.shape] == [str(size) for size in b.shape])


def has_own_trace(plan: SitePlan) -> bool:
    """Whether a trace is the site's own: branches close over their formula."""
    return bool(plan.branches)


def _structure(plan: SitePlan) -> Any:
    site = plan.site
    shape = (site.kind, site.out_features, site.in_features, site.transposed, site.conv, site.padding_idx)
    free = plan.ranks is not RankPolicy.FIXED
    rooms = ((role.name, 1 if role.ranked and free else room) for role, room in plan.roles())
    return (*shape, site.bias is not None, *rooms)


def _meaning(
    sites: Mapping[str, Site], plan: SitePlan, call: AdaptedCall, aux: tuple[str, ...], attention: BranchAttention
) -> tuple[Callable[..., tuple[Tensor, ...]], list[str]]:
    """The function an adapted op stands for, over its tensor operands, and the names of its extra outputs."""
    count, roles = len(call.tensors), tuple(call.operands)
    emits = [(name, i) for i, branch in enumerate(plan.branches) for name in branch.emits if name in aux]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        operands = dict(zip(roles, tensors[count:], strict=True))
        emitted: dict[str, list[Tensor]] = {}
        y = compute_adapted(plan, replace(call, host=tensors[:count], operands=operands), sites, emitted, attention)
        return (y, *(emitted[name].pop(0) for name, _ in emits))

    return function, [f"{name}:{slot_name(plan.site.path, branch_name(i))}" for name, i in emits]
