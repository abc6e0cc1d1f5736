"""expand: adapted ops become aten ops in their normal form; the other sites become the aten ops they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from lorac.ir.graph import ops
from lorac.ir.graph.adapted import adapted_output
from lorac.ir.graph.edit import add_outputs, inline
from lorac.ir.graph.graph import Graph, Level
from lorac.ir.host.sites import Site
from lorac.ir.slots.site import SitePlan

Tensor = torch.Tensor


def expand(graph: Graph, aux: tuple[str, ...] = ()) -> bool:
    """adapted -> expanded. The meaning of an adapted op is ``run_site``, traced once per structure.

    Args:
        graph: edited in place.
        aux: names of extra outputs to give (what branches emit).
    """
    if graph.level is not Level.ADAPTED:
        return False
    traces: dict[Any, fx.GraphModule] = {}
    extra: dict[str, fx.Node] = {}
    for node in graph.find(ops.adapted):
        _expand_one(graph, node, traces, aux, extra)
    ops.lower(graph.exported.graph_module)
    if extra:
        add_outputs(graph.exported, extra)
        graph.extra_outputs.extend(extra)
    graph.level = Level.EXPANDED
    return True


def _expand_one(
    graph: Graph, node: fx.Node, traces: dict[Any, fx.GraphModule], aux: tuple[str, ...], extra: dict[str, fx.Node]
) -> None:
    target, host_args, slots, path = node.args
    plan = graph.plans[str(path)]
    operands = [a for a in host_args if isinstance(a, fx.Node)]  # type: ignore[union-attr]
    roles = list(slots)  # type: ignore[arg-type]
    function, emitted = _meaning(graph.sites, plan, target, len(operands), roles, aux)
    inputs = [*operands, *slots.values()]  # type: ignore[union-attr]
    key = (target, tuple(roles), _structure(plan), *(tuple(map(str, n.meta["val"].shape[:-1])) for n in operands[:1]))
    traced, outputs = inline(
        graph.exported, node, function, inputs, traces.get(key) if not slots_differ(plan) else None
    )
    traces.setdefault(key, traced)
    node.replace_all_uses_with(outputs[0])
    graph.fx.erase_node(node)
    for name, output in zip(emitted, outputs[1:], strict=True):
        extra[name] = output


def slots_differ(plan: SitePlan) -> bool:
    """Whether a trace is the site's own: branches close over their formula."""
    return bool(plan.branches)


def _structure(plan: SitePlan) -> Any:
    site = plan.site
    shape = (site.kind, site.out_features, site.in_features, site.transposed, site.conv, site.padding_idx)
    flags = (bool(plan.rank), plan.c, plan.d, plan.t, plan.g, plan.h, plan.bound, plan.bias)
    return (*shape, site.bias is not None, *flags)


def _meaning(
    sites: Mapping[str, Site],
    plan: SitePlan,
    target: object,
    count: int,
    roles: list[str],
    aux: tuple[str, ...],
) -> tuple[Callable[..., tuple[Tensor, ...]], list[str]]:
    """The function an adapted op stands for, over its tensor operands, and the names of its extra outputs."""
    emits = [(name, i) for i, branch in enumerate(plan.branches) for name in branch.emits if name in aux]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        operands = dict(zip(roles, tensors[count:], strict=True))
        emitted: dict[str, list[Tensor]] = {}
        y = adapted_output(plan, target, tensors[:count], operands, sites, emitted)
        return (y, *(emitted[name].pop(0) for name, _ in emits))

    return function, [f"{name}:{plan.site.path}:branch{i}" for name, i in emits]
