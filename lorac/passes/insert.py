"""insert: every call of a touched site becomes one ``adapted`` op with the site's slots among its operands."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import fx

from lorac.errors import SiteUnreached
from lorac.ir.algebra import letters
from lorac.ir.graph import ops
from lorac.ir.graph.adapted import AdaptedCall, give, useful
from lorac.ir.graph.edit import add_inputs, inline, insert_call, new_dimension
from lorac.ir.graph.graph import Graph, Level, PackedSites, SlotInput
from lorac.ir.graph.passes import Outcome, Pass, Skip
from lorac.ir.host.sites import Site, SiteKind, factor_dtype
from lorac.ir.slots.layouts import layout_of
from lorac.ir.slots.role import Place
from lorac.ir.slots.roles import PACK_A, PACK_RANKS, ROLES, slot_name
from lorac.ir.slots.site import Ranks, SitePlan


@final
@dataclass(frozen=True)
class Insert(Pass):
    """host -> adapted. Slots become inputs of the graph, named ``<site>:<role>``."""

    name: ClassVar[str] = "insert"
    reads: ClassVar[Level] = Level.HOST
    leaves: ClassVar[Level] = Level.ADAPTED

    def apply(self, graph: Graph) -> Outcome:
        """As the class says; skipped are planned sites whose results the graph does not use, if it calls them at all.

        They lose their plans, and a note of the graph names them. Whether that leaves an adapter without effect,
        ``refuse_idle`` says.

        Raises:
            SiteUnreached: the graph uses the results of none of the planned sites.
        """
        calls: dict[str, list[fx.Node]] = {}
        used = useful(graph)
        for node in (node for node in graph.find(*ops.OPS) if node in used):
            calls.setdefault(ops.site_of(node), []).append(node)
        planned, unreached = _reached(graph, calls, used)
        nodes = _add_slots(graph, planned)
        for path, plan in planned.items():
            own = [slot for slot in graph.slots.values() if slot.site == path and not slot.members]
            slots = {slot.role: nodes[slot.name] for slot in own}
            if plan.site.within is not None:
                _replace_reads(graph, plan, slots)
                continue
            for node in calls[path]:
                _adapt(graph, node, slots)
        if graph.packs:
            _share(graph, nodes)
        graph.unused += unreached
        if unreached:
            graph.notes.append(_bypassed(unreached))
        return Outcome(bool(planned), tuple(Skip(path, _UNUSED) for path in unreached))


_UNUSED = "no output of the graph depends on it"
_MANY = 3
"""More sites than these are counted, not named."""


def _bypassed(paths: Sequence[str]) -> str:
    """What is to be said of sites without slots."""
    more = f" and {len(paths) - _MANY} more" if len(paths) > _MANY else ""
    named = ", ".join(f"'{path}'" for path in paths[:_MANY])
    return f"adapters have no effect at {named}{more}: no output depends on what is computed there"


def _add_slots(graph: Graph, planned: dict[str, SitePlan]) -> dict[str, fx.Node]:
    packed = {path for group in graph.packs.values() for path in group.sites}
    wanted: dict[str, tuple[Any, torch.dtype, str, str]] = {}
    for path, plan in planned.items():
        found = _inputs(graph, path, plan)
        wanted |= {name: spec for name, spec in found.items() if path not in packed or spec[3] != letters.A}
    members: dict[str, tuple[str, ...]] = {}
    for group in graph.packs.values():
        found = _pack_inputs(graph, group)
        wanted |= found
        members |= dict.fromkeys(found, group.sites)
    nodes = add_inputs(graph.exported, {name: (shape, dtype) for name, (shape, dtype, _, _) in wanted.items()})
    for name, (_, _, path, role) in wanted.items():
        graph.slots[name] = SlotInput(name, path, role, nodes[name].name, members.get(name, ()))
    return nodes


def _pack_inputs(graph: Graph, group: PackedSites) -> dict[str, tuple[Any, torch.dtype, str, str]]:
    site = graph.plans[group.name].site
    total = _dimension(graph, f"{group.name}:pack.rank", hint=3 * len(group.sites))
    place = Place(layout=layout_of(site), size=total, weight=_weight(graph, site))
    wide = (ROLES[letters.A].shape(place), ROLES[letters.A].dtype(site))
    found = {PACK_A: wide, PACK_RANKS: ((len(group.sites),), torch.int64)}
    return {slot_name(group.name, role): (*spec, group.name, role) for role, spec in found.items()}


def _share(graph: Graph, slots: Mapping[str, fx.Node]) -> None:
    """Compute x·A once per input that a pack's sites read, and hand each site its part as ``down``."""
    groups = {path: group for group in graph.packs.values() for path in group.sites}
    parts: dict[tuple[str, fx.Node], list[fx.Node]] = {}
    for node in graph.find(ops.adapted):
        call = AdaptedCall.of(node)
        group = groups.get(call.site)
        if group is None:
            continue
        key = (group.name, call.x)
        if key not in parts:
            parts[key] = _parts(graph, node, call.x, group, slots)
        give(node, {"down": parts[key][group.sites.index(call.site)]})


def _parts(
    graph: Graph, before: fx.Node, x: fx.Node, group: PackedSites, slots: Mapping[str, fx.Node]
) -> list[fx.Node]:
    a, ranks = (slots[slot_name(group.name, role)] for role in (PACK_A, PACK_RANKS))
    pairs = [slots[slot_name(path, letters.B)] for path in group.sites]
    program, dtype = graph.exported, a.meta["val"].dtype
    if x.meta["val"].dtype != dtype:
        x = insert_call(program, before, torch.ops.aten.to.dtype, x, dtype)
    parts = insert_call(program, before, ops.SPLIT_RANKS, insert_call(program, before, ops.MATMUL, x, a), ranks, pairs)
    return [insert_call(program, before, operator.getitem, parts, place) for place in range(len(pairs))]


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
        place = Place(layout=layout, size=rank if role.ranked else room, weight=_weight(graph, site))
        found[slot_name(path, role.name)] = (role.shape(place), role.dtype(site), path, role.name)
    for name, shape in plan.branch_shapes().items():
        found[slot_name(path, name)] = (shape, factor_dtype(site.dtype), path, name)
    return found


def _rank(graph: Graph, plan: SitePlan) -> int | torch.SymInt:
    """The rank of a site's pair in the graph: a size of its own, unless it is fixed."""
    if plan.ranks is Ranks.FIXED:
        return plan.rank
    return _dimension(graph, f"{plan.site.path}:rank", hint=3, least=plan.least_rank)


def _dimension(graph: Graph, name: str, hint: int, least: int = 0) -> torch.SymInt:
    """A size of the graph's own, called so wherever sizes are named."""
    size = new_dimension(graph.exported, f"rank_{len(graph.exported._range_constraints)}", hint, least)
    graph.axes[str(size)] = name
    return size


def _weight(graph: Graph, site: Site) -> Callable[[], torch.Tensor]:
    """A reader of the site's weight (out, in) without its values."""
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
    """The plans of the sites that the graph uses, which keeps no others; and the paths of those others."""
    planned = {path: plan for path, plan in graph.plans.items() if not plan.empty}
    missing = [path for path, plan in planned.items() if path not in calls and not _is_read(graph, plan, used)]
    if missing and len(missing) == len(planned):
        raise _unreached(f"'{missing[0]}' ({len(missing)} sites) is adapted", graph)
    graph.plans = {path: plan for path, plan in graph.plans.items() if path not in missing}
    return {path: plan for path, plan in planned.items() if path not in missing}, missing


def _is_read(graph: Graph, plan: SitePlan, used: Collection[fx.Node]) -> bool:
    """Whether the graph uses a weight that no call of a site has (a count of batches only training reads)."""
    bare = plan.site.within is not None
    return bare and any(graph.node(name) in used for name in _inputs_of(graph, plan.site.weight))


def refuse_idle(graphs: Iterable[Graph], touched: Mapping[str, Collection[str]]) -> None:
    """Refuse an adapter that no captured graph runs.

    Args:
        graphs: all of a program, after ``insert``.
        touched: adapter -> paths of the sites it touches.

    Raises:
        SiteUnreached: no graph uses any of an adapter's sites.
    """
    captured = list(graphs)
    reached = {path for graph in captured for path in graph.plans}
    for name, paths in touched.items():
        if paths and reached.isdisjoint(paths):
            raise _unreached(f"adapter '{name}' touches '{min(paths)}' ({len(paths)} sites)", *captured)


def _unreached(what: str, *graphs: Graph) -> SiteUnreached:
    names = " or ".join(f"'{graph.name}'" for graph in graphs)
    return SiteUnreached(
        f"{what}, but no output of the captured graph {names} depends on it",
        next_step="give example_inputs= that reach it, or leave the site out of targets=",
    )
