"""The check whether adapters fit a program's slots, and the ``reserve=`` that makes room for other adapters."""

from collections.abc import Mapping, Sequence
from dataclasses import fields

from lorac.errors import NeedsRecompile
from lorac.ir.algebra import operands
from lorac.ir.algebra.changes import LowRank
from lorac.ir.sites.site import KINDS_WITHOUT_WEIGHT, Site, SiteKind
from lorac.ir.slots.filling import find_branch_misfit, find_misfit
from lorac.ir.slots.plans import PreparedAdapter, SitePlan
from lorac.ir.slots.required_slots import Reserve, needs_merged_weight, quantized_merge_error
from lorac.ir.slots.roles import ROLES, roles_needed


def suggest_reserve(together: Sequence[PreparedAdapter]) -> str:
    """Return the ``reserve=`` argument with which these adapters fit, all active at once."""
    paths = sorted({path.rpartition(".")[2] for prepared in together for path in prepared.paths})
    changes = [change for prepared in together for change in prepared.changes.values()]
    rank = max((change.rank for change in changes if isinstance(change, LowRank)), default=0)
    # A role that has no field in ``Reserve`` fits through a bound weight.
    needed = {role.reserve or ROLES[operands.WEIGHT].reserve for change in changes for role in roles_needed(change)}
    arguments = [f"targets={paths}", f"rank={rank}"]
    arguments += [f"adapters={len(together)}"] if len(together) > 1 else []
    virtual = max((p.prefix.length for p in together if p.prefix is not None and p.changes), default=0)
    arguments += [f"virtual_tokens={virtual}"] if virtual else []
    arguments += [f"{field.name}=True" for field in fields(Reserve) if field.name in needed and field.default is False]
    return f"reserve=lorac.Reserve({', '.join(arguments)})"


def check_capacity(
    name: str, prepared: PreparedAdapter, plans: Mapping[str, SitePlan], sites: Mapping[str, Site]
) -> None:
    """Check that an adapter fits the plans.

    Raises:
        NeedsRecompile: it does not fit; the message names the ``reserve=`` with which it would.
        CompileError: it needs a merged weight at a quantised weight, for which no reserve makes room.
    """
    problems = []
    for path, change in prepared.changes.items():
        plan = plans.get(path)
        reason = "has no slot" if plan is None or plan.empty else find_misfit(plan, change)
        problems += [(path, reason)] if reason else []
    for path, term in prepared.branches.items():
        reason = find_branch_misfit(plans.get(path), term)
        problems += [(path, reason)] if reason else []
    for path in [path for path, _ in problems if path in prepared.changes and path in sites]:
        if sites[path].packed and needs_merged_weight(sites[path], prepared.changes[path]):
            raise quantized_merge_error(sites[path], f", and adapter '{name}' needs a merged weight there")
    if problems:
        path, reason = problems[0]
        kinds = {sites[path].kind if path in sites else SiteKind.PARAMETER for path in prepared.paths}
        # No reserve makes room for blocks, branches and bare parameters.
        admits = not prepared.branches and not kinds & KINDS_WITHOUT_WEIGHT
        room = f"{suggest_reserve([prepared])}, or with " if admits else ""
        raise NeedsRecompile(
            f"adapter '{name}' does not fit: '{path}' {reason} ({len(problems)} sites in all)",
            next_step=f"compile again with {room}the adapter in adapters=",
        )
