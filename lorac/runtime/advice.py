"""Whether an adapter fits what was compiled, and what would admit one that does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lorac.errors import NeedsRecompile
from lorac.ir.algebra.changes import LowRank
from lorac.ir.host.sites import Site, SiteKind
from lorac.ir.slots.filling import branch_misfit, does_not_fit
from lorac.ir.slots.site import Prepared, SitePlan


def admitting_reserve(together: Sequence[Prepared]) -> str:
    """The ``reserve=`` argument that would admit adapters that are active together."""
    paths = sorted({path.rpartition(".")[2] for prepared in together for path in prepared.paths})
    changes = [change for prepared in together for change in prepared.changes.values()]
    ranks = [v.rank for v in changes if isinstance(v, LowRank)]
    scales = any(v.e is not None or (isinstance(v, LowRank) and v.c is not None) for v in changes)
    whole = any(not isinstance(v, LowRank) or v.changes_input for v in changes)
    extras = (
        (f", adapters={len(together)}" if len(together) > 1 else "")
        + (", scales=True" if scales else "")
        + (", weights=True" if whole else "")
    )
    return f"reserve=lorac.Reserve(targets={paths}, rank={max(ranks, default=0)}{extras})"


def refuse_misfit(name: str, prepared: Prepared, plans: Mapping[str, SitePlan], sites: Mapping[str, Site]) -> None:
    """Raise ``NeedsRecompile`` where an adapter does not fit the plans, with the ``reserve=`` that admits it."""
    problems = []
    for path, change in prepared.changes.items():
        plan = plans.get(path)
        reason = "has no slot" if plan is None or plan.empty else does_not_fit(plan, change)
        if reason:
            problems.append((path, reason))
    for path, term in prepared.branches.items():
        reason = branch_misfit(plans.get(path), term)
        if reason:
            problems.append((path, reason))
    if problems:
        path, reason = problems[0]
        raise NeedsRecompile(
            f"adapter '{name}' does not fit: '{path}' {reason} ({len(problems)} sites in all)",
            next_step=f"compile again with {_room(prepared, sites)}the adapter in adapters=",
        )


def _room(prepared: Prepared, sites: Mapping[str, Site]) -> str:
    """The reserve that would admit an adapter, where one would: not for blocks, branches and bare parameters."""
    kinds = {sites[path].kind if path in sites else SiteKind.PARAMETER for path in prepared.paths}
    if prepared.branches or kinds & {SiteKind.BLOCK, SiteKind.PARAMETER}:
        return ""
    return f"{admitting_reserve([prepared])}, or with "
