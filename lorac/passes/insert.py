"""insert: every call of a touched site becomes one ``adapted`` op with the site's slots among its operands."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import fx

from lorac.errors import SiteError
from lorac.ir.algebra import operands as letters
from lorac.ir.graph import ops
from lorac.ir.graph.adapted_call import AdaptedCall, find_used_nodes
from lorac.ir.graph.edit import add_dimension, add_inputs, inline
from lorac.ir.graph.graph import Graph, Level, SlotInput
from lorac.ir.graph.passes import Pass, PassResult, Skip
from lorac.ir.sites import Site, SiteKind, factor_dtype
from lorac.ir.slots.layouts import layout_of
from lorac.ir.slots.plans import RankPolicy, SitePlan
from lorac.ir.slots.role import SlotSpec
from lorac.ir.slots.roles import slot_name


@final
@dataclass(frozen=True)
class InsertAdaptedCalls(Pass):
    """host -> adapted. Slots become inputs of the graph, named ``<site>:<role>``."""

    name: ClassVar[str] = "insert"
    reads: ClassVar[Level] = Level.HOST
    leaves: ClassVar[Level] = Level.ADAPTED

    def apply(self, graph: Graph) -> PassResult:
        """As the class says; skipped are planned sites whose results the graph does not use, if it calls them at all.

        They lose their plans, and a note of the graph names them. Whether that leaves an adapter without effect,
        ``refuse_idle`` says.

        Raises:
            SiteError: the graph uses the results of none of the planned sites.
        """
        calls: dict[str, list[fx.Node]] = {}
        used = find_used_nodes(graph)
        for node in (node for node in graph.find(*ops.SITE_OPS) if node in used):
            calls.setdefault(ops.site_of(node), []).append(node)
        planned, unreached = _reached(graph, calls, used)
        nodes = add_slots(graph, planned)
        slots_at: dict[str, dict[str, fx.Node]] = {path: {} for path in planned}
        for slot in graph.slots.values():
            slots_at[slot.site][slot.role] = nodes[slot.name]
        for path, plan in planned.items():
            slots = slots_at[path]
            if plan.site.within is not None:
                _replace_reads(graph, plan, slots)
                continue
            for node in calls[path]:
                _adapt(graph, node, slots)
        if unreached:
            graph.interface = replace(graph.interface, unused_sites=(*graph.interface.unused_sites, *unreached))
            graph.add_notes(_bypassed(unreached))
        return PassResult(bool(planned), tuple(Skip(path, _UNUSED) for path in unreached))


_UNUSED = "no output of the graph depends on it"
_MANY = 3
"""More sites than these are counted, not named."""


def _bypassed(paths: Sequence[str]) -> str:
    """What is to be said of sites without slots."""
    more = f" and {len(paths) - _MANY} more" if len(paths) > _MANY else ""
    named = ", ".join(f"'{path}'" for path in paths[:_MANY])
    return f"adapters have no effect at {named}{more}: no output depends on what is computed there"


def add_slots(graph: Graph, planned: Mapping[str, SitePlan]) -> dict[str, fx.Node]:
    """Add the slots of these plans to the inputs of a graph; public name -> node."""
    wanted: dict[str, tuple[Any, torch.dtype, str, str]] = {}
    for path, plan in planned.items():
        wanted |= _inputs(graph, path, plan)
    nodes = add_inputs(graph.exported, {name: (shape, dtype) for name, (shape, dtype, _, _) in wanted.items()})
    for name, (_, _, path, role) in wanted.items():
        pack = graph.packs.get(path)
        members, sizes = ((), ()) if pack is None else (pack.sites, pack.sizes)
        graph.slots[name] = SlotInput(name, path, role, nodes[name].name, members, sizes)
    return nodes


def _adapt(graph: Graph, node: fx.Node, slots: dict[str, fx.Node]) -> None:
    adapted = AdaptedCall.adapting(node, slots).before(graph.fx, node)
    node.replace_all_uses_with(adapted)
    graph.fx.erase_node(node)


def _inputs(graph: Graph, path: str, plan: SitePlan) -> dict[str, tuple[Any, torch.dtype, str, str]]:
    """Public name -> (shape, dtype, site, role) of a site's slots, in slot layout."""
    site, layout = plan.site, layout_of(plan.site)
    found: dict[str, tuple[Any, torch.dtype, str, str]] = {}
    rank: Any = 0
    if plan.rank:
        rank = _rank(graph, plan)
    for role, room in plan.roles():
        place = SlotSpec(layout=layout, size=rank if role.ranked else room, weight=_weight(graph, site))
        found[slot_name(path, role.name)] = (role.shape(place), role.dtype(site), path, role.name)
    for name, shape in plan.branch_shapes().items():
        found[slot_name(path, name)] = (shape, factor_dtype(site.dtype), path, name)
    return found


def _rank(graph: Graph, plan: SitePlan) -> int | torch.SymInt:
    """The rank of a site's pair in the graph: a size of its own, unless it is fixed."""
    if plan.ranks is RankPolicy.FIXED:
        return plan.rank
    return _dimension(graph, f"{plan.site.path}:rank", hint=3, least=plan.least_rank)


def _dimension(graph: Graph, name: str, hint: int, least: int = 0) -> torch.SymInt:
    """A size of the graph's own, called so wherever sizes are named."""
    size = add_dimension(graph.exported, f"rank_{len(graph.exported._range_constraints)}", hint, least)
    graph.axes[str(size)] = name
    return size


def _weight(graph: Graph, site: Site) -> Callable[[], torch.Tensor]:
    """A reader of the site's weight (out, in) without its values."""
    if site.weight is None:  # a pack's
        return lambda: torch.empty(site.kernel, device="meta")
    return lambda: site.present(torch.empty(graph.exported.state_dict[str(site.weight)].shape, device="meta"))


def _replace_reads(graph: Graph, plan: SitePlan, slots: Mapping[str, fx.Node]) -> None:
    """What a module reads in its own forward, a site's weight and its bias, becomes what their slots hold."""
    site = plan.site
    for fqn, role in ((site.weight, letters.WEIGHT), (site.bias, letters.BIAS)):
        names = _inputs_of(graph, fqn) if role in slots else []
        users = [(parameter, user) for parameter in map(graph.node, names) for user in list(parameter.users)]
        own = [(parameter, user) for parameter, user in users if len(names) == 1 or _module_of(user) == site.within]
        readers = {user for _, user in own}
        first = next((node for node in graph.fx.nodes if node in readers), None)
        if first is None:
            continue
        held = slots[role] if role == letters.BIAS else _as_stored(graph, site, slots[role], first)
        for parameter, user in own:
            user.replace_input_with(parameter, held)


def _as_stored(graph: Graph, site: Site, slot: fx.Node, before: fx.Node) -> fx.Node:
    """The weight in a slot as its module stores it, computed before a node."""
    if site.kind in {SiteKind.PARAMETER, SiteKind.MATRIX}:
        return slot
    return inline(graph.exported, before, lambda held: (layout_of(site).stored(held),), [slot])[1][0]


def _inputs_of(graph: Graph, fqn: str | None) -> list[str]:
    """Names of the nodes through which the graph reads a parameter or buffer."""
    signature = graph.exported.graph_signature
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return [name for name, held in stored.items() if held == fqn]


def _module_of(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def _reached(
    graph: Graph, calls: Mapping[str, Sequence[fx.Node]], used: Collection[fx.Node]
) -> tuple[dict[str, SitePlan], list[str]]:
    """The plans of the sites and packs that the graph uses, which keeps no others; and the paths of those others."""
    planned = {path: plan for path, plan in graph.plans.items() if not plan.empty and _has_place(plan)}
    packs = {path: pack for path, pack in graph.packs.items() if path in calls}
    packed = {member for pack in packs.values() for member in pack.sites}
    bare = [path for path in planned if path not in calls and path not in packed]
    missing = [path for path in bare if not _is_read(graph, planned[path], used)]
    if missing and len(missing) == len(planned):
        raise _unreached(f"'{missing[0]}' ({len(missing)} sites) is adapted", graph)
    graph.plans = {path: plan for path, plan in graph.plans.items() if path not in missing}
    alone = {path: plan for path, plan in planned.items() if path not in packed and path not in missing}
    return alone | {path: pack.plan for path, pack in packs.items() if not pack.plan.empty}, missing


def _has_place(plan: SitePlan) -> bool:
    """Whether a plan is of a place in the model; what is computed once gets its slots where it is read."""
    return plan.site.kind is not SiteKind.ONCE


def _is_read(graph: Graph, plan: SitePlan, used: Collection[fx.Node]) -> bool:
    """Whether the graph uses a weight that no call of a site has (a count of batches only training reads)."""
    bare = plan.site.within is not None
    return bare and any(graph.node(name) in used for name in _inputs_of(graph, plan.site.weight))


def check_adapters_reached(graphs: Iterable[Graph], touched: Mapping[str, Collection[str]]) -> None:
    """Refuse an adapter that no captured graph runs.

    Args:
        graphs: all of a program, after ``insert``.
        touched: adapter -> paths of the sites it touches.

    Raises:
        SiteError: no graph uses any of an adapter's sites.
    """
    captured = list(graphs)
    reached = {path for graph in captured for path, plan in graph.plans.items() if _has_place(plan)}
    for name, paths in touched.items():
        if paths and reached.isdisjoint(paths):
            raise _unreached(f"adapter '{name}' touches '{min(paths)}' ({len(paths)} sites)", *captured)


def _unreached(what: str, *graphs: Graph) -> SiteError:
    names = " or ".join(f"'{graph.name}'" for graph in graphs)
    return SiteError(
        f"{what}, but no output of the captured graph {names} depends on it",
        next_step="give example_inputs= that reach it, or leave the site out of targets=",
        code="site_unreached",
    )
