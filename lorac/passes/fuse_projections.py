"""pack: sites of one module that read the same input are computed as one.

q, k and v (and gate and up) read one x. What they compute is one site's: its matrix theirs one below the other, its A
[K, ΣR] theirs side by side, its B [ΣR, ΣN] block-diagonal. So there is one product with weights and one pair where
there were several, and one cut of constant sizes behind them, in the order of the first calls. Sites that are not
adapted are packed too. What a slot of a pack holds of its sites' slots, the table of roles says (``SlotRole.packed``).

The zeros beside the blocks of B are multiplied too. Packs are therefore of few sites, and of none whose pairs may be so
wide that the zeros cost more than a product with weights saves.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import fx

from lorac.ir.algebra import operands as letters
from lorac.ir.graph import ops
from lorac.ir.graph.adapted_call import find_used_nodes, group_sites_by_input
from lorac.ir.graph.edit import SLOTS_KEYWORD, insert_like
from lorac.ir.graph.graph import FusedProjection, Graph, Level, find_written_operands
from lorac.ir.graph.passes import Pass, PassResult, Skip
from lorac.ir.sites import Site, SiteKind
from lorac.ir.slots.plans import RankPolicy, SitePlan
from lorac.ir.slots.program_values import list_read_values, parse_value_name
from lorac.ir.slots.roles import ROLES

aten = torch.ops.aten
_MOST = 4
"""Sites of a pack. Each pair is multiplied by as many blocks of zeros as there are others."""
_FEW, _SHARE = 1 << 16, 1 / 8
"""Zeros in a B, per row that is computed: so many cost less than the ops that a pack saves, and so large a share of the
weights' own values may they be where they are more."""
_AGREED = (letters.WEIGHT, letters.BIAS)
"""What all sites of a pack have a slot for, or none: beside a slot, what is the base's would have to be another."""


@final
@dataclass(frozen=True)
class FuseProjections(Pass):
    """Compute sites that read one input as one. A site belongs to one pack at most.

    Attributes:
        constant: what the slots hold becomes constants of the program: weights that are bound by themselves otherwise.
    """

    name: ClassVar[str] = "pack"
    reads: ClassVar[Level] = Level.HOST
    leaves: ClassVar[Level] = Level.HOST
    constant: bool = False

    def apply(self, graph: Graph) -> PassResult:
        """As the class says; skipped is every adapted site that the graph calls and that is in no pack.

        Of those that would have had company a note of the graph says why they are computed apart.
        """
        calls = _calls(graph)
        unfit = {path: why for path in calls if (why := self._unfit(graph, path, calls[path])) is not None}
        groups = list(_groups(graph, unfit))
        together = dict.fromkeys(tuple(paths) for paths in groups if len(paths) > 1)
        found = [_packed(graph, paths) for paths in together if _alike(paths, groups)]
        made = [pack for pack in found if not _too_wide(graph, pack)]
        unfit |= dict.fromkeys((path for pack in found if pack not in made for path in pack.sites), _WIDE)
        known: dict[Any, Any] = {}
        for pack in made:
            _join(graph, pack, calls, known)
        graph.packs.update({pack.plan.site.path: pack for pack in made})
        packed = {path for pack in graph.packs.values() for path in pack.sites}
        adapted = [path for path, plan in graph.plans.items() if path in calls and not plan.empty]
        left = {path: unfit.get(path) or _why_alone(path, groups) for path in adapted if path not in packed}
        graph.add_notes(*_apart(graph, left, unfit))
        return PassResult(bool(made), tuple(Skip(path, why) for path, why in left.items()))

    def _unfit(self, graph: Graph, path: str, calls: Sequence[fx.Node]) -> str | None:
        """Why a site's product can be no part of another; None where it can."""
        site, plan = graph.sites.get(path), graph.plans.get(path)
        if site is None or site.kind is not SiteKind.LINEAR:
            return "it is no linear layer"
        if plan is not None and (why := self._unfit_slots(plan)) is not None:
            return why
        if any(parse_value_name(name)[1] == path for name in list_read_values(graph.plans.values())):
            return "a branch reads what it computes, or its weight"
        return _unfit_weight(graph, site, calls)

    def _unfit_slots(self, plan: SitePlan) -> str | None:
        """Why the slots of a site cannot lie in those of a pack; None where they can."""
        if plan.branches:
            return "a branch acts on what it computes"
        if plan.bound and not self.constant:
            return "its weight is bound by itself"
        if plan.rank and plan.ranks is RankPolicy.FIXED:
            return "its rank is fixed"
        return next((role.alone for role, _ in plan.roles() if role.packed is None), None)


def _unfit_weight(graph: Graph, site: Site, calls: Sequence[fx.Node]) -> str | None:
    """Why a site's weight cannot be written as a part of another: it would be there twice, or is not as it should."""
    weights = {call.args[1] for call in calls}
    weight = weights.pop()
    if weights or not isinstance(weight, fx.Node) or weight.op != "placeholder":
        return "its weight is not as the model stores it"
    held = graph.exported.state_dict.get(str(site.weight))
    if type(held) not in {torch.Tensor, torch.nn.Parameter}:
        return f"its weight is held as {type(held).__name__}"
    if site.shares or any(user not in calls for user in weight.users):
        return "its weight is read elsewhere too"
    return "its input is written to" if any(map(_is_written, calls)) else None


def _is_written(call: fx.Node) -> bool:
    x = call.args[0]
    return isinstance(x, fx.Node) and any(x in find_written_operands(user) for user in x.users)


def _calls(graph: Graph) -> dict[str, list[fx.Node]]:
    """Path -> its calls whose results the graph uses, in order; those of packs left out."""
    used, calls = find_used_nodes(graph), dict[str, list[fx.Node]]()
    for node in graph.find(*ops.SITE_OPS):
        if node in used and ops.site_of(node) not in graph.packs:
            calls.setdefault(ops.site_of(node), []).append(node)
    return calls


def _groups(graph: Graph, unfit: Mapping[str, str]) -> Iterator[list[str]]:
    """Paths of the sites of one module that read one input and may be packed, few at a time, in the order of calls."""
    for paths in group_sites_by_input(graph).values():
        alike: dict[Any, list[str]] = {}
        for path in (path for path in paths if path not in unfit and path not in graph.packs):
            plan = graph.plans.get(path)
            agreed = () if plan is None else tuple(role for role in _AGREED if role in plan.room)
            site = graph.sites[path]
            alike.setdefault((path.rpartition(".")[0], site.dtype, site.packed, agreed), []).append(path)
        for found in alike.values():
            yield from (found[start : start + _MOST] for start in range(0, len(found), _MOST))


def _alike(paths: tuple[str, ...], groups: Sequence[Sequence[str]]) -> bool:
    """Whether the calls of these sites all come in the same company: a shared layer is called several times."""
    shared = [group for group in groups if set(group) & set(paths)]
    return all(tuple(group) == paths for group in shared) and len(set(paths)) == len(paths)


def _why_alone(path: str, groups: Sequence[Sequence[str]]) -> str:
    """Why a site that might be packed is not."""
    if all(len(group) == 1 for group in groups if path in group):
        return "no other site of its module that may be packed with it reads its input"
    return "its calls do not all read an input together with the same sites"


def _apart(graph: Graph, left: Mapping[str, str], unfit: Mapping[str, str]) -> Iterator[str]:
    """What is to be said of adapted layers that do not share a product with others of their module."""
    company = {path for paths in group_sites_by_input(graph).values() if len(paths) > 1 for path in paths}
    by_reason: dict[str, list[str]] = {}
    for path, why in left.items():
        if path in unfit and path in company and graph.sites[path].kind is SiteKind.LINEAR:
            by_reason.setdefault(why, []).append(path)
    for why, paths in by_reason.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        yield f"'{paths[0]}'{more}: computed apart from layers that read the same input, since {why}"


def _packed(graph: Graph, paths: tuple[str, ...]) -> FusedProjection:
    """Sites as one: a site of all their outputs, with slots for whatever one of them has a slot for."""
    sites = [graph.sites[path] for path in paths]
    plans = [graph.plans[path] for path in paths if path in graph.plans]
    sizes = tuple(site.out_features for site in sites)
    owner = paths[0].rpartition(".")[0]
    path = ".".join(filter(None, (owner, "|".join(path.rpartition(".")[2] for path in paths))))
    bias = f"{path}.{letters.BIAS}" if any(site.bias for site in sites) else None
    site = Site(path, SiteKind.LINEAR, sum(sizes), sites[0].in_features, sites[0].dtype, None, bias)
    rooms = {name: [plan.room[name] for plan in plans if name in plan.room] for name in ROLES}
    room = {name: sum(found) if ROLES[name].ranked else 1 for name, found in rooms.items() if found}
    least = RankPolicy.FROM_ONE if any(plan.ranks is RankPolicy.FROM_ONE for plan in plans) else RankPolicy.FROM_ZERO
    return FusedProjection(paths, sizes, SitePlan(site, room, ranks=least))


_WIDE = "its pair may be so wide that the zeros beside it in a pack cost more than the pack saves"


def _too_wide(graph: Graph, pack: FusedProjection) -> bool:
    """Whether the block-diagonal B of a pack may hold too many zeros."""
    ranks = [graph.plans[path].rank if path in graph.plans else 0 for path in pack.sites]
    site = pack.plan.site
    zeros = sum(ranks) * site.out_features - sum(rank * n for rank, n in zip(ranks, pack.sizes, strict=True))
    return zeros > max(_FEW, _SHARE * site.in_features * site.out_features)


def _join(graph: Graph, pack: FusedProjection, calls: Mapping[str, Sequence[fx.Node]], known: dict[Any, Any]) -> None:
    """Put one call and a cut into the place of the calls of each input; packs share what is ``known`` of calls."""
    by_input: dict[Any, list[fx.Node]] = {}
    for call in (call for path in pack.sites for call in calls[path]):
        by_input.setdefault(call.args[0], []).append(call)
    for together in by_input.values():
        parts = _parts(pack, functools.partial(_made, graph, known, min(together)), together)
        for path, call, part in zip(pack.sites, together, parts, strict=True):
            part.meta = {**call.meta, "custom": {SLOTS_KEYWORD: path}}
            call.replace_all_uses_with(part)
            graph.fx.erase_node(call)


def _parts(pack: FusedProjection, made: Callable[..., fx.Node], calls: Sequence[fx.Node]) -> list[fx.Node]:
    """The outputs of sites by one call, put before the first of their own by what makes calls there."""
    site = pack.plan.site
    weight = made(aten.cat.default, [call.args[1] for call in calls])
    bias = None
    if site.bias is not None:
        given = zip(pack.sizes, (call.args[2] for call in calls), strict=True)
        bias = made(
            aten.cat.default, [made(aten.zeros.default, [n], dtype=site.dtype) if b is None else b for n, b in given]
        )
    y = made(ops.LINEAR, calls[0].args[0], weight, bias, site.path)
    cut = made(ops.SPLIT, y, list(pack.sizes), -1)
    return [made(operator.getitem, cut, place) for place in range(len(calls))]


def _made(graph: Graph, known: dict[Any, Any], before: fx.Node, op: Any, *operands: Any, **named: Any) -> fx.Node:
    """A call that belongs to the module around a site, put before a call of that site."""
    node = insert_like(graph.exported, known, before, op, *operands, **named)
    around = list(before.meta.get("nn_module_stack", {}).items())
    if around and around[-1][1][0] == ops.site_of(before):
        node.meta["nn_module_stack"] = dict(around[:-1])
    return node
