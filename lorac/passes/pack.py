"""pack: sites that read the same input share one x·A.

q, k and v (and gate and up) read one x. Their A's become one slot [K, ΣR], so the first halves of their low-rank
branches are one matmul, split after by the ranks in a second, small slot [n]. The layout is fixed here, at compile
time: sites in the order of their first call, whatever is active later.
"""

from __future__ import annotations

from collections import defaultdict

from torch import fx

from lorac.ir.graph import ops
from lorac.ir.graph.graph import Graph, Level, Pack
from lorac.ir.host.sites import SiteKind


def pack(graph: Graph) -> bool:
    """Note which sites share an input; ``insert`` gives each such group one A. A site belongs to one group at most."""
    if graph.level is not Level.HOST or graph.packs:
        return False
    groups: dict[fx.Node, list[str]] = defaultdict(list)
    for node in graph.find(ops.LINEAR):
        path = str(node.args[-1])
        plan = graph.plans.get(path)
        # An A that sites have in common is one already.
        if plan is not None and plan.rank and not plan.g and plan.site.kind is SiteKind.LINEAR:
            groups[node.args[0]].append(path)  # type: ignore[index]
    together = {tuple(paths) for paths in groups.values() if len(paths) > 1}
    for paths in sorted(together):
        # Shared layers are called several times: their calls must all come in the same company.
        shared = [group for group in groups.values() if set(group) & set(paths)]
        if all(tuple(group) == paths for group in shared) and len(set(paths)) == len(paths):
            graph.packs[paths[0]] = Pack(paths[0], paths)
    return bool(graph.packs)
