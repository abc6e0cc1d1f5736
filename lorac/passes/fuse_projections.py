"""fuse_projections: sites of one module that read the same input are computed as one.

The projections q, k and v (and gate and up) read one x. One product with their matrices, one below the other, takes
the place of several, and a split of constant sizes follows. Sites without adapters are fused too. An adapted site adds
the product of x with its own slots to its part. One pair for all would have a block-diagonal B, mostly of zeros.
Slots that become constants are weights and biases alone, and are joined as the base's are.
"""

import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
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
_NO_OTHERS = "no other site of its module that may be fused with it reads its input"
_OTHERS_VARY = "its calls do not all read an input together with the same sites"
_COMMON_ROLES = (WEIGHT, BIAS)
"""Roles for which all fused sites have a slot, or none: next to a slot, the base's values would need another one."""


@final
@dataclass(frozen=True)
class FuseProjections(Pass):
    """Compute sites that read one input as one. A site belongs to at most one fused projection.

    Attributes:
        constant: whether the slots become constants of the program: then bound weights can be fused too.
    """

    name: ClassVar[str] = "fuse_projections"
    reads: ClassVar[Level] = Level.HOST
    leaves: ClassVar[Level] = Level.HOST
    constant: bool = False

    def apply(self, graph: Graph) -> PassResult:
        """Fuse the sites; skip every adapted site that the graph calls and that stays single.

        A note of the graph says why sites with neighbours that read the same input stay single.
        """
        used = find_used_nodes(graph)
        found = ops.group_calls(node for node in graph.find(*ops.SITE_OPS) if node in used)
        calls = {path: nodes for path, nodes in found.items() if path not in graph.projections}
        unfit = {path: why for path in calls if (why := self._find_obstacle(graph, path, calls[path])) is not None}
        groups = list(_group_fusable(graph, unfit, _COMMON_ROLES if self.constant else ()))
        candidates = dict.fromkeys(tuple(paths) for paths in groups if len(paths) > 1)
        # A shared layer is called several times: it is fused if each call is together with the same sites.
        together = {paths: [tuple(group) for group in groups if set(group) & set(paths)] for paths in candidates}
        fused = [
            self._describe_fusion(graph, paths)
            for paths, found in together.items()
            if set(found) == {paths} and len(set(paths)) == len(paths)
        ]
        known: KnownCalls = {}
        for projection in fused:
            _replace_calls(graph, projection, calls, known)
        graph.projections.update({projection.plan.site.path: projection for projection in fused})
        members = {path for projection in graph.projections.values() for path in projection.sites}
        adapted = [path for path, plan in graph.plans.items() if path in calls and not plan.empty]
        accompanied = {path for group in groups if len(group) > 1 for path in group}
        single = {
            path: unfit.get(path) or (_OTHERS_VARY if path in accompanied else _NO_OTHERS)
            for path in adapted
            if path not in members
        }
        graph.add_notes(*_single_notes(graph, single, unfit))
        return PassResult(bool(fused), tuple(Skip(path, why) for path, why in single.items()))

    def _find_obstacle(self, graph: Graph, path: str, calls: Sequence[fx.Node]) -> str | None:
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
        return _find_weight_obstacle(graph, site, calls)

    def _describe_fusion(self, graph: Graph, paths: tuple[str, ...]) -> FusedProjection:
        """Describe sites as one with all their outputs, and with their slots where these become constants."""
        sites = [graph.sites[path] for path in paths]
        sizes = tuple(site.out_features for site in sites)
        module = paths[0].rpartition(".")[0]
        path = ".".join(filter(None, (module, "|".join(path.rpartition(".")[2] for path in paths))))
        bias = f"{path}.{BIAS}" if any(site.bias for site in sites) else None
        site = Site(path, SiteKind.LINEAR, sum(sizes), sites[0].in_features, sites[0].dtype, None, bias)
        plan = graph.plans.get(paths[0])
        return FusedProjection(paths, sizes, SitePlan(site, plan.room if plan is not None and self.constant else {}))


def _find_weight_obstacle(graph: Graph, site: Site, calls: Sequence[fx.Node]) -> str | None:
    """Return why a site's weight cannot be written as a part of a larger one; None where it can."""
    weights = {call.args[1] for call in calls}
    weight = weights.pop()
    if weights or not isinstance(weight, fx.Node) or weight.op != "placeholder":
        return "its weight is not as the model stores it"
    tensor = graph.exported.state_dict.get(str(site.weight))
    if type(tensor) not in {torch.Tensor, torch.nn.Parameter}:
        return f"its weight is a {type(tensor).__name__}"
    if site.shares or any(user not in calls for user in weight.users):
        return "its weight is read elsewhere too"
    inputs = [call.args[0] for call in calls]
    written = any(x in find_written_operands(user) for x in inputs if isinstance(x, fx.Node) for user in x.users)
    return "its input is written to" if written else None


def _group_fusable(graph: Graph, unfit: Mapping[str, str], common_roles: Sequence[str]) -> Iterator[list[str]]:
    """Yield groups of sites of one module that read one input and may be fused, in the order of their calls."""
    for paths in group_sites_by_input(graph).values():
        groups: dict[object, list[str]] = {}
        for path in (path for path in paths if path not in unfit and path not in graph.projections):
            plan, site = graph.plans.get(path), graph.sites[path]
            common = () if plan is None else tuple(role for role in common_roles if role in plan.room)
            groups.setdefault((path.rpartition(".")[0], site.dtype, site.packed, common), []).append(path)
        yield from groups.values()


def _single_notes(graph: Graph, single: Mapping[str, str], unfit: Mapping[str, str]) -> Iterator[str]:
    """Yield notes on adapted layers that do not share a product with others that read their input."""
    accompanied = {path for paths in group_sites_by_input(graph).values() if len(paths) > 1 for path in paths}
    by_reason: dict[str, list[str]] = {}
    for path, why in single.items():
        if path in unfit and path in accompanied and graph.sites[path].kind is SiteKind.LINEAR:
            by_reason.setdefault(why, []).append(path)
    for why, paths in by_reason.items():
        named = list_some(paths, 1)
        yield f"{named}: computed apart from layers that read the same input, since {why}"


def _replace_calls(
    graph: Graph, projection: FusedProjection, calls: Mapping[str, Sequence[fx.Node]], known: KnownCalls
) -> None:
    by_input: dict[object, list[fx.Node]] = {}
    for call in (call for path in projection.sites for call in calls[path]):
        by_input.setdefault(call.args[0], []).append(call)
    for together in by_input.values():
        outputs = _insert_fused(graph, projection, together, known)
        for path, call, output in zip(projection.sites, together, outputs, strict=True):
            output.meta = {**call.meta, "custom": {SLOTS_KEYWORD: path}}
            graph.replace_node(call, output)


def _insert_fused(
    graph: Graph, projection: FusedProjection, calls: Sequence[fx.Node], known: KnownCalls
) -> list[fx.Node]:
    """Insert one call and a split before the first call of the members; return the outputs of each."""
    site, first = projection.plan.site, min(calls)

    def insert(op: Target, *operands: Argument, **named: Argument) -> fx.Node:
        node = insert_repeated_call(graph.exported, known, first, op, *operands, **named)
        modules = list(first.meta.get("nn_module_stack", {}).items())
        if modules and modules[-1][1][0] == ops.site_of(first):  # the call belongs to the module around the sites
            node.meta["nn_module_stack"] = dict(modules[:-1])
        return node

    adapted = {path for path, plan in graph.plans.items() if not plan.empty}
    own = [path for path in projection.sites if projection.plan.empty and path in adapted]
    weight = insert(aten.cat.default, [call.args[1] for call in calls])
    # An adapted site adds its own bias: it may scale the product, or have another bias.
    biases = [None if path in own else call.args[2] for path, call in zip(projection.sites, calls, strict=True)]
    bias = None
    if any(part is not None for part in biases):
        zeros = functools.partial(insert, aten.zeros.default, dtype=site.dtype)
        pairs = zip(projection.sizes, biases, strict=True)
        bias = insert(aten.cat.default, [zeros([size]) if part is None else part for size, part in pairs])
    x = calls[0].args[0]
    split = insert(ops.SPLIT, insert(ops.LINEAR, x, weight, bias, site.path), list(projection.sizes), -1)
    parts = [insert(operator.getitem, split, index) for index in range(len(calls))]
    members = zip(projection.sites, calls, parts, strict=True)
    return [insert(ops.MEMBER, x, part, call.args[2], path) if path in own else part for path, call, part in members]
