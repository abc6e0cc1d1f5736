"""insert: every call of a touched site becomes one ``adapted`` op with the site's slots among its operands."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lorac.errors import SiteUnreached
from lorac.ir import ops
from lorac.ir.edit import add_inputs, inherit, new_dimension
from lorac.ir.graph import Graph, Level, SlotInput
from lorac.ir.kinds import kind_of
from lorac.ir.slots import SitePlan, factor_dtype
from lorac.ir.types import SiteKind


def insert(graph: Graph) -> bool:
    """host -> adapted. Slots become inputs of the graph, named ``<site>:<role>``.

    Raises:
        SiteUnreached: no call of a planned site was captured.
    """
    if graph.level is not Level.HOST:
        return False
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.find(*ops.OPS):
        calls.setdefault(str(node.args[-1]), []).append(node)
    planned = {path: plan for path, plan in graph.plans.items() if not plan.empty}
    _refuse_unreached(graph, planned, calls)
    wanted = {name: spec for path, plan in planned.items() for name, spec in _inputs(graph, path, plan).items()}
    nodes = add_inputs(graph.exported, {name: (shape, dtype) for name, (shape, dtype, _, _) in wanted.items()})
    for name, (_, _, path, role) in wanted.items():
        graph.slots[name] = SlotInput(name, path, role, nodes[name].name)
    for path, plan in planned.items():
        slots = {slot.role: nodes[slot.name] for slot in graph.slots.values() if slot.site == path}
        if plan.site.kind is SiteKind.PARAMETER:
            _replace_parameter(graph, plan, slots["weight"])
            continue
        for node in calls[path]:
            _adapt(graph, node, path, slots)
    graph.level = Level.ADAPTED
    return True


def _adapt(graph: Graph, node: fx.Node, path: str, slots: dict[str, fx.Node]) -> None:
    with graph.fx.inserting_before(node):
        adapted = graph.fx.call_function(ops.adapted, (node.target, node.args[:-1], slots, path))
    adapted.meta["val"] = node.meta["val"]
    inherit(adapted, node)
    adapted.meta["custom"] = {"lorac": path}
    node.replace_all_uses_with(adapted)
    graph.fx.erase_node(node)


def _inputs(graph: Graph, path: str, plan: SitePlan) -> dict[str, tuple[Any, torch.dtype, str, str]]:
    """Public name -> (shape, dtype, site, role) of a site's slots, in slot layout."""
    site, kind = plan.site, kind_of(plan.site)
    dtype = factor_dtype(site.dtype)
    found: dict[str, tuple[Any, torch.dtype, str, str]] = {}

    def slot(role: str, shape: Any, of: torch.dtype = dtype) -> None:
        found[f"{path}:{role}"] = (shape, of, path, role)

    if plan.rank:
        rank = new_dimension(graph.exported, f"rank_{len(graph.exported._range_constraints)}", hint=3)
        example_a = kind.layout_a(torch.empty(site.in_features, 3, device="meta")).shape
        example_b = kind.layout_b(torch.empty(3, site.out_features, device="meta")).shape
        # Where the layouts put the rank: axis 1 of A and 0 of B for matrices, the other way round for kernels.
        conv = site.conv is not None
        slot("a", _with_rank(example_a, 0 if conv else 1, rank))
        slot("b", _with_rank(example_b, 1 if conv else 0, rank))
    for role, size in (("c", site.out_features), ("d", site.in_features), ("e", site.out_features)):
        if getattr(plan, role):
            slot(role, (size,))
    if plan.bound:
        slot("weight", _weight_shape(graph, plan), site.dtype)
        if plan.bound_bias:
            slot("bias", (site.out_features,), site.dtype)
    for index, branch in enumerate(plan.branches):
        slot(f"branch{index}.t", (1,))
        for j, shape in enumerate(branch.params.values()):
            slot(f"branch{index}.{j}", shape)
    return found


def _with_rank(shape: torch.Size, axis: int, rank: torch.SymInt) -> tuple[Any, ...]:
    return tuple(rank if i == axis else size for i, size in enumerate(shape))


def _weight_shape(graph: Graph, plan: SitePlan) -> tuple[int, ...]:
    stored = graph.exported.state_dict[str(plan.site.weight)]
    if plan.site.kind is SiteKind.PARAMETER:
        return tuple(stored.shape)
    meta = plan.site.present(torch.empty(stored.shape, device="meta"))
    return tuple(kind_of(plan.site).layout_weight(meta).shape)


def _replace_parameter(graph: Graph, plan: SitePlan, slot: fx.Node) -> None:
    """Reads of a bare parameter inside its own module become reads of the slot."""
    owner = str(plan.site.weight).rpartition(".")[0]
    signature = graph.exported.graph_signature
    names = [name for name, fqn in signature.inputs_to_parameters.items() if fqn == plan.site.weight]
    for name in names:
        parameter = graph.node(name)
        for user in list(parameter.users):
            if _module_of(user) == owner or len(names) == 1:
                user.replace_input_with(parameter, slot)


def _module_of(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def _refuse_unreached(graph: Graph, planned: dict[str, SitePlan], calls: dict[str, list[fx.Node]]) -> None:
    missing = [p for p, plan in planned.items() if p not in calls and plan.site.kind is not SiteKind.PARAMETER]
    if missing:
        raise SiteUnreached(
            f"'{missing[0]}' is adapted, but the captured graph '{graph.name}' never calls it ({len(missing)} sites)",
            next_step="give example_inputs= that reach it, or leave the site out of targets=",
        )
