"""Plans, choices, and the interface and slots of graphs as JSON."""

from collections.abc import Iterable, Mapping

import torch

from lorac.errors import ArtifactError, Unavailable, nearest_name
from lorac.ir.algebra.formulas import Formula
from lorac.ir.calls.interface import Interface
from lorac.ir.graph.graph import SlotInput
from lorac.ir.sites.site import Site
from lorac.ir.slots.choice import Active, Choice
from lorac.ir.slots.plans import BranchSlot, RankPolicy, Reason, SitePlan
from lorac.ir.slots.roles import ROLES
from lorac.storage.strict_json import JsonObject


def plan_to_json(plan: SitePlan) -> JsonObject:
    """Return a plan as JSON; of its site only ``own_size``, since the skeleton describes the rest."""
    return {
        "room": dict(plan.room),
        "ranks": plan.ranks,
        "branches": [branch_to_json(branch) for branch in plan.branches],
        "reasons": [[r.adapter, r.why] for r in plan.reasons],
        **({"own_size": plan.site.own_size} if plan.site.own_size else {}),
    }


def plan_from_json(site: Site, stored: JsonObject) -> SitePlan:
    """Return the plan of a site.

    Raises:
        ArtifactError: the plan has room for an unknown role.
    """
    unknown = [role for role in stored["room"] if role not in ROLES]
    if unknown:
        raise ArtifactError(
            f"the plan of '{site.path}' has room for '{unknown[0]}', which is not a role of a slot",
            nearest=nearest_name(unknown[0], ROLES),
            next_step="save the artifact again with this version",
        )
    branches = tuple(branch_from_json(site.path, branch) for branch in stored["branches"])
    reasons = tuple(Reason(adapter, site.path, why) for adapter, why in stored["reasons"])
    return SitePlan(site, stored["room"], branches, reasons, ranks=RankPolicy(stored["ranks"]))


def branch_to_json(branch: BranchSlot) -> JsonObject:
    """Return a branch's slot as JSON, without its formula."""
    return {
        "key": branch.key,
        "params": {name: list(shape) for name, shape in branch.params.items()},
        "emits": list(branch.emits),
        "reads": list(branch.reads),
        "once": branch.once,
        "mixes": branch.mixes,
    }


def branch_from_json(path: str, stored: JsonObject) -> BranchSlot:
    """Return a branch's slot at a site. Its formula is part of the program, so calling it here is refused."""

    def missing_formula(*_: object) -> torch.Tensor:
        raise Unavailable(
            f"the branch at '{path}' is part of a stored program and has no formula any more",
            next_step="compile from the model again, with the adapter in adapters=",
        )

    return BranchSlot(
        key=stored["key"],
        formula=Formula(missing_formula, "a stored program", path),
        params={name: tuple(shape) for name, shape in stored["params"].items()},
        emits=tuple(stored["emits"]),
        reads=tuple(stored["reads"]),
        once=stored["once"],
        mixes=stored.get("mixes", False),
    )


def choice_to_json(choice: Choice) -> JsonObject:
    """Return strength and rank of each adapter, by name."""
    return {name: {"strength": how.strength, "rank": how.rank} for name, how in choice}


def choice_from_json(stored: Mapping[str, JsonObject]) -> dict[str, Active] | None:
    """Return a choice in the form that ``swap`` takes."""
    return {name: Active(how["strength"], how["rank"]) for name, how in stored.items()} or None


def graph_to_json(interface: Interface, slots: Iterable[SlotInput]) -> JsonObject:
    """Return a graph's interface and slot inputs as JSON."""
    entries = [{**vars(slot), "members": list(slot.members)} for slot in slots]
    return {"signature": interface.to_json(), "slots": entries}


def graph_from_json(stored: JsonObject) -> tuple[Interface, dict[str, SlotInput]]:
    """Return the interface and the slot inputs, by name, that ``graph_to_json`` wrote.

    Raises:
        ArtifactError: the interface contradicts itself.
    """
    slots = [SlotInput(**{**entry, "members": tuple(entry["members"])}) for entry in stored["slots"]]
    return Interface.from_json(stored["signature"]), {slot.name: slot for slot in slots}
