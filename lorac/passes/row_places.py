"""The sites of a graph whose slots have places, so that rows of a batch may choose different adapters."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx

from lorac.errors import list_some
from lorac.ir.graph.graph import Graph
from lorac.ir.graph.nodes import find_input_examples, get_example
from lorac.ir.graph.symbolic_shapes import constant_size
from lorac.ir.sites.site import SiteKind
from lorac.ir.slots.placed_execution import why_shared
from lorac.ir.slots.plans import SitePlan
from lorac.ir.slots.roles import ROLES, branch_index
from lorac.passes.branch_places import has_rows, place_branches


def is_placed(plan: SitePlan, role: str) -> bool:
    """Whether a slot of a site has places."""
    if role not in ROLES:
        return plan.branches[branch_index(role)].axes is not None
    return plan.placed and not plan.why_shared(role)


def add_places(
    graph: Graph,
    planned: Mapping[str, SitePlan],
    calls: Mapping[str, Sequence[fx.Node]],
    why_kinds_shared: Mapping[SiteKind, str],
    why_branches_shared: str,
) -> dict[str, SitePlan]:
    """Return the plans, with places where rows may have different slots; update the graph's plans.

    A note of the graph names the sites whose rows share slots, and why.

    Args:
        graph: its plans are edited.
        planned: path -> the slots of a site that the graph uses.
        calls: path -> the calls of a site.
        why_kinds_shared: kinds of sites whose slots have no places -> why.
        why_branches_shared: why branches have no places; empty if they may have.
    """
    first = next((value for value in find_input_examples(graph.exported).values() if value.dim()), None)
    rows = None if first is None else first.shape[0]
    # A size that the trace fixed keeps its symbol.
    batch = rows if isinstance(rows, torch.SymInt) and constant_size(rows) is None else None
    found, shared = dict(planned), dict[str, list[str]]()
    for path, plan in planned.items():
        if not plan.room:
            continue
        unaligned = "the program is for one number of rows" if batch is None else ""
        if batch is not None and not all(has_rows(get_example(call.args[0]), batch) for call in calls.get(path, ())):
            unaligned = "the rows of its input are not those of the batch"
        why = why_kinds_shared.get(plan.site.kind, "") or unaligned or why_shared(plan)
        if why:
            shared.setdefault(why, []).append(path)
        else:
            found[path] = replace(plan, placed=any(not plan.why_shared(role) for role in plan.room))
    graph.plans = {path: found.get(path, plan) for path, plan in graph.plans.items()}
    branches, placed = {path: calls[path] for path, plan in found.items() if plan.branches}, dict[str, SitePlan]()
    if branches and why_branches_shared:
        shared.setdefault(why_branches_shared, []).extend(branches)
    else:
        placed = place_branches(graph, batch, branches, shared)
    for why, paths in shared.items():
        graph.add_notes(
            f"{list_some(paths, 1)}: rows with adapters of their own take a call for each choice, since {why}"
        )
    return {**found, **placed}
