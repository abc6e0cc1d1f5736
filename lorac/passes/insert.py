"""insert: each call of a touched site becomes an ``adapted`` op whose operands include the site's slots."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, final

import torch
from torch import fx

from lorac.errors import SiteError, list_some
from lorac.ir.algebra.operands import BIAS, WEIGHT
from lorac.ir.graph import ops
from lorac.ir.graph.adapted_call import AdaptedCall, find_used_nodes
from lorac.ir.graph.edit import add_dimension, add_inputs, inline
from lorac.ir.graph.graph import Graph, Level, Skip, SlotInput
from lorac.ir.graph.nodes import find_module_path, get_example
from lorac.ir.graph.passes import Pass, PassResult
from lorac.ir.sites.site import Site, SiteKind, factor_dtype
from lorac.ir.slots.layouts import layout_of
from lorac.ir.slots.places import ADAPTERS_AXIS, placed_shape
from lorac.ir.slots.plans import RankPolicy, SitePlan
from lorac.ir.slots.roles import SlotSpec, is_parameter, slot_name
from lorac.passes.row_places import add_places, is_placed

_MAX_NAMED = 3
"""Number of sites that a note names; further sites are counted."""


@final
@dataclass(frozen=True)
class InsertAdaptedCalls(Pass):
    """host -> adapted. Slots become inputs of the graph, named ``<site>:<role>``.

    Attributes:
        rows: whether rows of a batch may have different slots, if the graph has an axis of rows.
        why_shared: kinds of sites whose slots all rows share -> why (``Dialect``).
        why_branches_shared: why all rows share the slots of branches; empty if they need not (``Dialect``).
    """

    name: ClassVar[str] = "insert"
    reads: ClassVar[Level] = Level.HOST
    leaves: ClassVar[Level] = Level.ADAPTED
    rows: bool = False
    why_shared: Mapping[SiteKind, str] = field(default_factory=dict)
    why_branches_shared: str = ""

    def apply(self, graph: Graph) -> PassResult:
        """Replace the calls; skip planned sites whose outputs the graph does not use.

        Skipped sites lose their plans, and a note of the graph names them. ``check_adapters_reached`` refuses adapters
        that have no effect.

        Raises:
            SiteError: the graph uses no output of a planned site.
        """
        used = find_used_nodes(graph)
        calls = ops.group_calls(node for node in graph.find(*ops.SITE_OPS) if node in used)
        # Slots of ``once`` are added where its values are read.
        planned = {path: p for path, p in graph.plans.items() if not p.empty and p.site.kind is not SiteKind.ONCE}
        projections = {path: graph.projections[path].plan for path in calls if path in graph.projections}
        projections = {path: plan for path, plan in projections.items() if not plan.empty}
        fused = {member for path in projections for member in graph.projections[path].sites}
        unused = [path for path, p in planned.items() if path not in fused and not _is_used(graph, p.site, calls, used)]
        if unused and len(unused) == len(planned):
            raise _unreached(f"'{unused[0]}' ({len(unused)} sites) is adapted", graph)
        graph.plans = {path: plan for path, plan in graph.plans.items() if path not in unused}
        planned = {path: p for path, p in planned.items() if path not in fused and path not in unused} | projections
        if self.rows:
            planned = add_places(graph, planned, calls, self.why_shared, self.why_branches_shared)
        nodes = add_slots(graph, planned)
        slots_at: dict[str, dict[str, fx.Node]] = {path: {} for path in planned}
        for slot in graph.slots.values():
            slots_at[slot.site][slot.role] = nodes[slot.name]
        for path, plan in planned.items():
            if plan.site.within is not None:
                _replace_reads(graph, plan, slots_at[path])
                continue
            for node in calls[path]:
                graph.replace_node(node, AdaptedCall.adapting(node, slots_at[path]).insert_before(graph.fx, node))
        if unused:
            graph.interface = replace(graph.interface, unused_sites=(*graph.interface.unused_sites, *unused))
            named = list_some(unused, _MAX_NAMED)
            graph.add_notes(f"adapters have no effect at {named}: no output depends on what is computed there")
        return PassResult(bool(planned), tuple(Skip(path, "no output of the graph depends on it") for path in unused))


def add_slots(graph: Graph, planned: Mapping[str, SitePlan]) -> dict[str, fx.Node]:
    """Add the slots of these plans to the graph's inputs; return their nodes by public name."""
    inputs: dict[str, tuple[Sequence[int | torch.SymInt], torch.dtype]] = {}
    owners: dict[str, tuple[str, str]] = {}
    adapters: int | torch.SymInt = 1
    if any(is_placed(plan, role) for plan in planned.values() for role in plan.slot_roles()):
        first = next((slot for slot in graph.slots.values() if slot.placed), None)
        if first is None:
            adapters = add_dimension(graph.exported, ADAPTERS_AXIS, 2, 1)
            graph.axes[str(adapters)] = ADAPTERS_AXIS
        else:  # all slots of a graph have the same number of places
            adapters = get_example(graph.node(first.node)).shape[0]
    for path, plan in planned.items():
        for role, shape, dtype in _slot_inputs(graph, plan):
            name, by_token = slot_name(path, role), not is_parameter(role)
            whole = placed_shape(shape, adapters, by_token=by_token) if is_placed(plan, role) else shape
            inputs[name], owners[name] = (whole, dtype), (path, role)
    nodes = add_inputs(graph.exported, inputs)
    for name, (path, role) in owners.items():
        projection = graph.projections.get(path)
        members = () if projection is None else projection.sites
        graph.slots[name] = SlotInput(name, path, role, nodes[name].name, members, is_placed(graph.plan_of(path), role))
    return nodes


def _slot_inputs(graph: Graph, plan: SitePlan) -> Iterator[tuple[str, Sequence[int | torch.SymInt], torch.dtype]]:
    """Yield the role, shape and dtype of each slot of a plan; ranks that vary are new symbolic sizes."""
    site = plan.site
    rank: int | torch.SymInt = plan.rank
    if plan.rank and plan.ranks is not RankPolicy.FIXED:
        rank = add_dimension(graph.exported, f"rank_{len(graph.exported._range_constraints)}", 3, plan.least_rank)
        graph.axes[str(rank)] = f"{site.path}:rank"

    def make_weight() -> torch.Tensor:
        """Make the site's weight (out, in) as a tensor without values."""
        if site.weight is None:  # a fused projection has no stored weight
            return torch.empty(site.kernel, device="meta")
        return site.present(torch.empty(graph.exported.state_dict[site.weight].shape, device="meta"))

    for role, room in plan.roles():
        spec = SlotSpec(layout=layout_of(site), size=rank if role.ranked else room, weight=make_weight)
        yield role.name, role.shape(spec), role.dtype(site)
    for name, shape in plan.branch_shapes().items():
        yield name, shape, factor_dtype(site.dtype)


def _replace_reads(graph: Graph, plan: SitePlan, slots: Mapping[str, fx.Node]) -> None:
    """Replace the reads of a weight and bias in their module's forward by reads of their slots."""
    site = plan.site
    for fqn, role in ((site.weight, WEIGHT), (site.bias, BIAS)):
        names = find_inputs(graph, fqn) if role in slots else []
        reads = [(parameter, user) for parameter in map(graph.node, names) for user in list(parameter.users)]
        inside = [(parameter, user) for parameter, user in reads if find_module_path(user) == site.within]
        reads = inside or (reads if len(names) == 1 else [])
        readers = {user for _, user in reads}
        first = next((node for node in graph.fx.nodes if node in readers), None)
        if first is None:
            continue
        value = slots[role]
        if role == WEIGHT and site.kind not in {SiteKind.PARAMETER, SiteKind.MATRIX}:
            _, (value,) = inline(graph.exported, first, lambda weight: (layout_of(site).stored(weight),), [value])
        for parameter, user in reads:
            user.replace_input_with(parameter, value)


def find_inputs(graph: Graph, fqn: str | None) -> list[str]:
    """Return the inputs for a stored tensor; a tied tensor has one input per name, of which only one is read."""
    signature, held = graph.exported.graph_signature, graph.exported.state_dict
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    own = held.get(str(fqn))
    return [name for name, target in stored.items() if target == fqn or (own is not None and held.get(target) is own)]


def _is_used(graph: Graph, site: Site, calls: Collection[str], used: Collection[fx.Node]) -> bool:
    """Return whether a graph calls a site, or a module reads its weight in its own forward, some only in training."""
    reads = [] if site.within is None else find_inputs(graph, site.weight)
    return site.path in calls or any(graph.node(name) in used for name in reads)


def check_adapters_reached(graphs: Iterable[Graph], touched: Mapping[str, Collection[str]]) -> None:
    """Refuse an adapter that has no effect in any captured graph.

    Args:
        graphs: all graphs of a program, after ``insert``.
        touched: adapter -> paths of the sites that it touches.

    Raises:
        SiteError: no graph uses a site of an adapter.
    """
    captured = list(graphs)
    plans = [item for graph in captured for item in graph.plans.items()]
    reached = {path for path, plan in plans if plan.site.kind is not SiteKind.ONCE}
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
