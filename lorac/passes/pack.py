"""pack: sites that read the same input share one x·A.

q, k and v (and gate and up) read one x. Their A's become one slot [K, ΣR], so the first halves of their low-rank
branches are one matmul, split after by the ranks in a second, small slot [n]. The layout is fixed here, at compile
time: sites in the order of their first call, whatever is active later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from lorac.ir.algebra import letters
from lorac.ir.graph.adapted import sites_by_input
from lorac.ir.graph.graph import Graph, Level, PackedSites
from lorac.ir.graph.passes import Outcome, Pass, Skip
from lorac.ir.host.sites import SiteKind
from lorac.ir.slots.site import Ranks, SitePlan


@final
@dataclass(frozen=True)
class Pack(Pass):
    """Note which sites share an input; ``insert`` gives each such group one A. A site belongs to one group at most."""

    name: ClassVar[str] = "pack"
    reads: ClassVar[Level] = Level.HOST
    leaves: ClassVar[Level] = Level.HOST

    def apply(self, graph: Graph) -> Outcome:
        """As the class says; skipped is every adapted site that the graph calls and that shares no A."""
        before = dict(graph.packs)
        calls = [[path for path in paths if path in graph.plans] for paths in sites_by_input(graph).values()]
        adapted = {path: graph.plans[path] for paths in calls for path in paths if not graph.plans[path].empty}
        unfit = {path: why for path, plan in adapted.items() if (why := _unfit(plan)) is not None}
        groups = [[path for path in paths if path in adapted and path not in unfit] for paths in calls]
        together = {tuple(paths) for paths in groups if len(paths) > 1}
        graph.packs.clear()
        graph.packs.update(
            {paths[0]: PackedSites(paths[0], paths) for paths in sorted(together) if _alike(paths, groups)}
        )
        packed = {path for group in graph.packs.values() for path in group.sites}
        left = {path: unfit.get(path) or _why_alone(path, groups) for path in adapted if path not in packed}
        return Outcome(graph.packs != before, tuple(Skip(path, why) for path, why in left.items()))


def _unfit(plan: SitePlan) -> str | None:
    """Why a site's A can be no part of another; None where it can."""
    if not plan.rank:
        return "it has no A"
    if plan.ranks is Ranks.FIXED:
        return "its rank is fixed"
    if letters.G in plan.room:
        return "its A is one that sites have in common already"
    return None if plan.site.kind is SiteKind.LINEAR else "it is no linear layer"


def _alike(paths: tuple[str, ...], groups: Sequence[Sequence[str]]) -> bool:
    """Whether the calls of these sites all come in the same company: a shared layer is called several times."""
    shared = [group for group in groups if set(group) & set(paths)]
    return all(tuple(group) == paths for group in shared) and len(set(paths)) == len(paths)


def _why_alone(path: str, groups: Sequence[Sequence[str]]) -> str:
    """Why a site whose A could be packed is not."""
    if all(len(group) == 1 for group in groups if path in group):
        return "no other site with an A to share reads its input"
    return "its calls do not all read an input together with the same sites"
