"""Slots: what of a site can be replaced at run time, and the one function that computes an adapted site from them.

A ``SitePlan`` says which slots a site has; it is fixed at compile time. A ``SiteSlots`` holds the tensors that fill
them for one choice of adapters. Both go by role (``lorac.ir.slots.roles``). ``run_site`` is the meaning of both, in
torch ops: the eager backend calls it, the other backends trace it, so no backend has a formula of its own.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from lorac.ir.algebra import operands as letters
from lorac.ir.algebra.changes import Change
from lorac.ir.algebra.formulas import Formula
from lorac.ir.sites import Site, SiteKind
from lorac.ir.slots.role import SlotRole, Stage
from lorac.ir.slots.roles import ROLES, branch_name, parameter_role, strength_role

Tensor = torch.Tensor


@dataclass(frozen=True)
class BranchSlot:
    """Room for one branch adapter of a given structure.

    Attributes:
        key: the structure: variant name, hyper-parameters, parameter shapes. Adapters with equal keys fit.
        formula: (x, y, params, ctx) -> y', called like y.
        params: parameter name -> shape.
        emits: names of the extra outputs the branch gives.
        reads: names of the program values it reads (``lorac.ir.slots.program_values``).
        once: path of the site that computes what it reads as ``own:``; empty where it reads no such.
        mixes: whether it gives a token something of those before it, and so needs the whole text.
        instead: what has a weight form in its place, as a next step; empty where nothing has.
    """

    key: str
    formula: Formula = field(compare=False)
    params: Mapping[str, tuple[int, ...]] = field(compare=False)
    emits: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    once: str = ""
    mixes: bool = False
    instead: str = field(default="", compare=False)


@dataclass(frozen=True)
class Reason:
    """Why a term has no cheaper form or place, as it was found where that was decided.

    Attributes:
        adapter: whose term it is about; None: it is about all of the site's.
        site: path of the site.
        why: of an adapter a clause that begins with a verb, of a site a whole sentence.
    """

    adapter: str | None
    site: str
    why: str

    def __str__(self) -> str:
        return self.why if self.adapter is None else f"'{self.adapter}' {self.why}"


class RankPolicy(enum.StrEnum):
    """Which ranks the pair of a site may have at run time, up to its room."""

    FROM_ZERO = "from zero"
    FROM_ONE = "from one"
    """A pair that is off holds one component of zeros."""
    FIXED = "fixed"
    """Always the whole room, filled up with zeros."""


@dataclass(frozen=True)
class SitePlan:
    """Which slots a site has.

    Attributes:
        site: the site.
        room: role -> its room: the largest rank that fits, for the pair and what lies along its rank; the size of the
            blocks, for input transforms; 1 for what has no size of its own. A role that is absent has no slot.
        branches: room for branches.
        reasons: why the weight is bound.
        ranks: which ranks the pair may have, as the target's dialect has it.
    """

    site: Site
    room: Mapping[str, int] = field(default_factory=dict)
    branches: tuple[BranchSlot, ...] = ()
    reasons: tuple[Reason, ...] = ()
    ranks: RankPolicy = RankPolicy.FROM_ZERO

    @property
    def empty(self) -> bool:
        """Nothing can be replaced here."""
        return not (self.room or self.branches)

    @property
    def rank(self) -> int:
        """Largest rank that fits, 0 where there is no pair."""
        return self.room.get(letters.A, 0)

    @property
    def least_rank(self) -> int:
        """The smallest rank that the pair may have; what is smaller is filled up with zeros."""
        if self.ranks is RankPolicy.FIXED:
            return self.rank
        return min(self.rank, 1) if self.ranks is RankPolicy.FROM_ONE else 0

    @property
    def bound(self) -> bool:
        """Whether the weight itself is a slot."""
        return letters.WEIGHT in self.room

    def roles(self) -> Iterator[tuple[SlotRole, int]]:
        """The roles that have slots, in the table's order, and their room."""
        return ((role, self.room[role.name]) for role in ROLES.values() if role.name in self.room)

    def branch_shapes(self) -> dict[str, tuple[int, ...]]:
        """Role -> shape of everything that branches hold: each its strength, and its parameters.

        What is computed once has no strength of its own: it is those of the branches that read it.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        for index, slot in enumerate(self.branches):
            branch = branch_name(index)
            shapes |= {} if self.site.kind is SiteKind.ONCE else {strength_role(branch): (1,)}
            shapes |= {parameter_role(branch, j): shape for j, shape in enumerate(slot.params.values())}
        return shapes


@dataclass(frozen=True, eq=False)
class BranchFill:
    """One branch in its slot: strength t and its parameters."""

    strength: Tensor
    params: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class SiteSlots:
    """The tensors in a site's slots, in slot layout (``lorac.ir.slots.layouts``).

    Attributes:
        tensors: role -> what is in its slot; the pair has rank 0 where nothing is active.
        branches: one fill per branch slot, in the plan's order; None where the slot is idle.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    branches: tuple[BranchFill | None, ...] = ()

    @functools.cached_property
    def stages(self) -> Mapping[Stage, tuple[tuple[SlotRole, Tensor], ...]]:
        """Stage -> the roles that act there, in the table's order, and their tensors."""
        found: dict[Stage, tuple[tuple[SlotRole, Tensor], ...]] = dict.fromkeys(Stage, ())
        for role in ROLES.values():
            if role.name in self.tensors:
                found[role.stage] += ((role, self.tensors[role.name]),)
        return found

    @functools.cached_property
    def leaves_base(self) -> bool:
        """The base's own product and bias stay as they are; a low-rank branch may come beside."""
        return all(stage.of_pair for stage, present in self.stages.items() if present)

    def named(self) -> dict[str, Tensor]:
        """Every role -> tensor, the branches' own among them."""
        tensors = dict(self.tensors)
        for index, fill in enumerate(self.branches):
            if fill is None:
                continue
            branch = branch_name(index)
            tensors[strength_role(branch)] = fill.strength
            tensors |= {parameter_role(branch, j): tensor for j, tensor in enumerate(fill.params)}
        return tensors

    @staticmethod
    def of_named(tensors: Mapping[str, Tensor], plan: SitePlan) -> SiteSlots:
        """The inverse of ``named``."""
        fills = []
        for index, slot in enumerate(plan.branches):
            branch = branch_name(index)
            params = tuple(tensors[parameter_role(branch, j)] for j in range(len(slot.params)))
            fills.append(BranchFill(tensors[strength_role(branch)], params))
        return SiteSlots({name: tensor for name, tensor in tensors.items() if name in ROLES}, tuple(fills))


@dataclass(frozen=True, eq=False)
class BranchTerm:
    """One adapter's branch at one site: the slot it needs and its parameters."""

    slot: BranchSlot
    params: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class PreparedAdapter:
    """An adapter in its normal forms, ready to fill slots.

    Attributes:
        changes: site path -> the change in a weight form.
        branches: site path -> branch term.
        truncatable: None where ``Active(rank=…)`` may not cut it; else the power by which its scale falls with the
            rank (``LowRank.truncated``).
        reasons: why its terms have no cheaper form.
    """

    changes: Mapping[str, Change]
    branches: Mapping[str, BranchTerm] = field(default_factory=dict)
    truncatable: float | None = None
    reasons: tuple[Reason, ...] = ()

    @property
    def paths(self) -> frozenset[str]:
        """Every site it touches."""
        return frozenset(self.in_order())

    def in_order(self) -> tuple[str, ...]:
        """The same, each once: changes before branches, in the adapter's order."""
        return tuple(dict.fromkeys((*self.changes, *self.branches)))
