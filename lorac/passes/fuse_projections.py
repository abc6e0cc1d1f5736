"""fuse_projections: compute the sites of one module that read the same input as one site.

The projections q, k and v (and gate and up) read one x. Their matrices are concatenated by rows: one product and a
split with constant sizes replace several products. Sites without adapters are fused too. Each adapted site adds the
product of x with its slots to its part of the split: one LoRA pair for all sites would have a block-diagonal B, which
is mostly zeros. If slots become constants, only weights and biases have slots, and these are concatenated like the
base's.
"""

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import fx
from torch.fx.node import Argument, Target

from lorac.errors import list_some
from lorac.ir.algebra.operands import BIAS, WEIGHT
from lorac.ir.graph import ops
from lorac.ir.graph.adapted_call import find_used_nodes, group_sites_by_input
from lorac.ir.graph.edit import KnownCalls, insert_repeated_call
from lorac.ir.graph.graph import FusedProjection, Graph, Level, Skip, find_written_operands
from lorac.ir.graph.nodes import SLOTS_KEYWORD
from lorac.ir.graph.passes import Pass, PassResult
from lorac.ir.sites.site import Site, SiteKind
from lorac.ir.slots.plans import SitePlan
from lorac.ir.slots.program_values import list_read_values, parse_value_name
from lorac.ir.slots.roles import Stage

aten = torch.ops.aten
_NO_OTHERS = "no other site of its module reads its input and can be fused with it"
_OTHERS_VARY = "its calls do not all share an input with the same sites"
_COMMON_ROLES = (WEIGHT, BIAS)
"""Roles of which all sites that are fused together have a slot, or none has.

Otherwise the fused slot would also have to contain the base values of the sites without one.
"""


@final
@dataclass(frozen=True)
class FuseProjections(Pass):
    """Compute sites that read the same input as one site. A site belongs to at most one fused projection.

    Attributes:
        constant: whether the slots become constants of the program; if so, sites with bound weights are fused too.
    """

    name: ClassVar[str] = "fuse_projections"
    reads: ClassVar[Level] = Level.HOST
    leaves: ClassVar[Level] = Level.HOST
    constant: bool = False

    def apply(self, graph: Graph) -> PassResult:
        """Fuse the sites; report each adapted site that the graph calls and does not fuse as skipped.

        Add a note to the graph for each such site that has linear neighbours, with the reason.
        """
        used = find_used_nodes(graph)
        calls = ops.group_calls(node for node in graph.find(*ops.SITE_OPS) if node in used)
        calls = {path: nodes for path, nodes in calls.items() if path not in graph.projections}
        obstacles = {path: why for path in calls if (why := self._find_obstacle(graph, path, calls[path])) is not None}
        by_input = list(group_sites_by_input(graph).values())
        groups: list[tuple[str, ...]] = []  # for each input, those of one module that may be fused, in call order
        for paths in by_input:
            alike: dict[object, list[str]] = {}
            for path in (path for path in paths if path not in obstacles and path not in graph.projections):
                plan, site, module = graph.plans.get(path), graph.sites[path], path.rpartition(".")[0]
                room = plan.room if self.constant and plan is not None else ()
                slots = tuple(role for role in _COMMON_ROLES if role in room)
                alike.setdefault((module, site.dtype, site.packed, slots), []).append(path)
            groups += map(tuple, alike.values())

        projections, known = list[FusedProjection](), KnownCalls()
        # A shared layer is called several times: each time next to other sites, or twice with one input.
        for group in dict.fromkeys(groups):
            members = set(group)
            always_together = all(other == group for other in groups if members.intersection(other))
            if len(members) == len(group) > 1 and always_together:
                projections.append(self._describe_fusion(graph, group))

        for projection in projections:
            # Each site is called exactly once with each input: the calls with one input have the order of the sites.
            calls_by_input: dict[object, list[fx.Node]] = {}
            for call in (call for path in projection.sites for call in calls[path]):
                calls_by_input.setdefault(call.args[0], []).append(call)
            for site_calls in calls_by_input.values():
                outputs = _insert_fused(graph, projection, site_calls, known)
                for path, call, output in zip(projection.sites, site_calls, outputs, strict=True):
                    output.meta = {**call.meta, "custom": {SLOTS_KEYWORD: path}}
                    graph.replace_node(call, output)
        graph.projections.update({projection.plan.site.path: projection for projection in projections})

        fused = {path for projection in graph.projections.values() for path in projection.sites}
        grouped = {path for group in groups if len(group) > 1 for path in group}
        single = {
            path: obstacles.get(path) or (_OTHERS_VARY if path in grouped else _NO_OTHERS)
            for path, plan in graph.plans.items()
            if path in calls and path not in fused and not plan.empty
        }
        with_neighbours = {path for paths in by_input if len(paths) > 1 for path in paths} & obstacles.keys()
        by_reason: dict[str, list[str]] = {}
        for path, why in single.items():
            if path in with_neighbours and graph.sites[path].kind is SiteKind.LINEAR:
                by_reason.setdefault(why, []).append(path)
        for why, paths in by_reason.items():
            named = list_some(paths, 1)
            graph.add_notes(f"{named}: computed apart from layers that read the same input, since {why}")
        return PassResult(bool(projections), tuple(Skip(path, why) for path, why in single.items()))

    def _find_obstacle(self, graph: Graph, path: str, calls: Sequence[fx.Node]) -> str | None:
        """Return why a site cannot be fused with another site; None if it can."""
        site, plan = graph.sites.get(path), graph.plans.get(path)
        if site is None or site.kind is not SiteKind.LINEAR:
            return "it is not a linear layer"
        if plan is not None and plan.branches:
            return "a branch acts on what it computes"
        if plan is not None and plan.bound and not self.constant:
            return "its weight is bound by itself"
        if plan is not None and any(role.stage is Stage.INPUT for role, _ in plan.roles()):
            return "its input is changed before the product"
        if any(parse_value_name(name)[1] == path for name in list_read_values(graph.plans.values())):
            return "a branch reads what it computes, or its weight"
        weight, *others = {call.args[1] for call in calls}
        if others or not isinstance(weight, fx.Node) or weight.op != "placeholder":
            return "its weight is not as the model stores it"
        tensor = graph.exported.state_dict.get(str(site.weight))
        if type(tensor) not in {torch.Tensor, torch.nn.Parameter}:
            return f"its weight is a {type(tensor).__name__}"
        if site.shares or any(user not in calls for user in weight.users):
            return "its weight is read elsewhere too"
        inputs = [call.args[0] for call in calls]
        written = any(x in find_written_operands(user) for x in inputs if isinstance(x, fx.Node) for user in x.users)
        return "its input is written to" if written else None

    def _describe_fusion(self, graph: Graph, paths: tuple[str, ...]) -> FusedProjection:
        """Return the site that computes the outputs of several sites; it has their slots if slots become constants."""
        sites = [graph.sites[path] for path in paths]
        sizes = tuple(site.out_features for site in sites)
        module = paths[0].rpartition(".")[0]
        path = ".".join(filter(None, (module, "|".join(path.rpartition(".")[2] for path in paths))))
        bias = f"{path}.{BIAS}" if any(site.bias for site in sites) else None
        site = Site(
            path,
            SiteKind.LINEAR,
            out_features=sum(sizes),
            in_features=sites[0].in_features,
            dtype=sites[0].dtype,
            weight=None,
            bias=bias,
        )
        plan = graph.plans.get(paths[0])  # fused sites have slots of the same roles
        slots = plan.room if plan is not None and self.constant else {}
        return FusedProjection(paths, sizes, SitePlan(site, slots))


def _insert_fused(
    graph: Graph, projection: FusedProjection, calls: Sequence[fx.Node], known: KnownCalls
) -> list[fx.Node]:
    """Insert one fused call and a split before the earliest of the sites' calls with one input.

    Args:
        calls: each site's call with this input, in the order of ``projection.sites``.

    Returns:
        The output of each site, in the same order.
    """
    site, first = projection.plan.site, min(calls)

    def insert(op: Target, *operands: Argument, **named: Argument) -> fx.Node:
        node = insert_repeated_call(graph.exported, known, first, op, *operands, **named)
        modules = dict(first.meta.get("nn_module_stack", {}))
        if modules:
            _, (innermost, *_) = modules.popitem()
            if innermost == ops.site_of(first):  # the fused call belongs to the parent module of the sites
                node.meta["nn_module_stack"] = modules
        return node

    adapted = {path for path, plan in graph.plans.items() if not plan.empty}
    with_slots = [path for path in projection.sites if projection.plan.empty and path in adapted]
    weight = insert(aten.cat.default, [call.args[1] for call in calls])
    # A site with its own slots adds its bias itself: it may scale the product, or replace the bias.
    biases = [None if path in with_slots else call.args[2] for path, call in zip(projection.sites, calls, strict=True)]
    bias = None
    if any(part is not None for part in biases):
        zeros = functools.partial(insert, aten.zeros.default, dtype=site.dtype)
        pairs = zip(projection.sizes, biases, strict=True)
        bias = insert(aten.cat.default, [zeros([size]) if part is None else part for size, part in pairs])
    x = calls[0].args[0]
    split = insert(ops.SPLIT, insert(ops.LINEAR, x, weight, bias, site.path), list(projection.sizes), -1)
    parts = [insert(operator.getitem, split, index) for index in range(len(calls))]
    members = zip(projection.sites, calls, parts, strict=True)
    return [
        insert(ops.MEMBER, x, part, call.args[2], path) if path in with_slots else part for path, call, part in members
    ]
