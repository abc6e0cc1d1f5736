"""Which sites of a graph have slots with places, so that the rows of a batch may choose their own adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx

from lorac.errors import list_some
from lorac.ir.graph.graph import Graph
from lorac.ir.slots.placed_execution import why_shared
from lorac.ir.slots.plans import SitePlan
from lorac.ir.slots.roles import ROLES


def is_placed(plan: SitePlan, role: str) -> bool:
    """Whether a slot of a site has places; strengths and parameters of branches have none."""
    return plan.placed and role in ROLES and not ROLES[role].why_shared


def add_places(
    graph: Graph, planned: Mapping[str, SitePlan], calls: Mapping[str, Sequence[fx.Node]]
) -> dict[str, SitePlan]:
    """Return the plans, with places where rows may have slots of their own; the graph takes over these plans.

    A note of the graph says where they may not, and why.

    Args:
        graph: its plans are edited.
        planned: path -> the slots of a site that the graph uses.
        calls: path -> the calls of a site.
    """
    batch = _batch_size(graph)
    found, shared = dict(planned), dict[str, list[str]]()
    for path, plan in planned.items():
        why = _why_shared(plan, calls.get(path, ()), batch)
        if why:
            shared.setdefault(why, []).append(path)
            continue
        found[path] = replace(plan, placed=any(not role.why_shared for role, _ in plan.roles()))
    graph.plans = {path: found.get(path, plan) for path, plan in graph.plans.items()}
    for why, paths in shared.items():
        graph.add_notes(
            f"{list_some(paths, 1)}: rows with adapters of their own take a call for each choice, since {why}"
        )
    return found


def _batch_size(graph: Graph) -> torch.SymInt | None:
    """Return the number of rows of the graph's first input; None where the program fixes it."""
    inputs = graph.exported.graph_signature.user_inputs
    values = [graph.node(name).meta["val"] for name in inputs if isinstance(name, str)]
    sizes = [value.shape[0] for value in values if isinstance(value, torch.Tensor) and value.dim()]
    return sizes[0] if sizes and isinstance(sizes[0], torch.SymInt) else None


def _why_shared(plan: SitePlan, calls: Sequence[fx.Node], batch: torch.SymInt | None) -> str:
    """Return why all rows of a batch share the slots of a site; empty where each may have its own."""
    if batch is None:
        return "the program is for one number of rows"
    why = why_shared(plan)
    if why:
        return why
    first = (call.args[0].meta["val"].shape[0] for call in calls)  # type: ignore[union-attr]  # a node
    aligned = all(isinstance(size, torch.SymInt) and size.node.expr == batch.node.expr for size in first)
    return "" if aligned else "the rows of its input are not those of the batch"
