"""The slots of a site: their plan at compile time, and their tensors for a choice of adapters.

A ``SitePlan`` describes a site's slots; it is fixed at compile time. A ``SiteSlots`` has their tensors for one choice
of adapters. Both are organised by role (``lorac.ir.slots.roles``). ``lorac.ir.slots.execution.run_site`` computes an
adapted site from both.
"""

import enum
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from lorac.ir.algebra import operands
from lorac.ir.algebra.changes import Change, list_tensors
from lorac.ir.algebra.formulas import Formula
from lorac.ir.sites.site import Site, SiteKind
from lorac.ir.slots.prefix import Prefix
from lorac.ir.slots.roles import ROLES, SlotRole, Stage, branch_roles


class ValueAxis(enum.StrEnum):
    """The first axis of a value that a branch reads, where rows have different adapters."""

    ROWS = "rows"
    PLACES = "places"
    NEITHER = "neither"
    """All rows share the value."""


@dataclass(frozen=True)
class BranchSlot:
    """A slot for one branch adapter of a given structure.

    Attributes:
        key: the structure: variant name, hyper-parameters and parameter shapes. Adapters with equal keys fit.
        formula: (x, y, params, ctx) -> y', of the shape of y.
        params: parameter name -> shape.
        emits: names of the branch's extra outputs.
        reads: names of the program values that the branch reads (``lorac.ir.slots.program_values``).
        once: path of the site that computes the ``own:`` values it reads; empty if it reads none.
        mixes: whether a token's output depends on earlier tokens, so that whole sequences are needed.
        instead: the next step in messages: how to get an adapter with a weight form; may be empty.
        axes: where rows may have different branches: value -> its first axis, for the values that the branch reads and
            those that ``once`` computes; None where all rows share one branch.
    """

    key: str
    formula: Formula = field(compare=False)
    params: Mapping[str, tuple[int, ...]] = field(compare=False)
    emits: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    once: str = ""
    mixes: bool = False
    instead: str = field(default="", compare=False)
    axes: Mapping[str, ValueAxis] | None = field(default=None, compare=False)

    @property
    def structure(self) -> tuple[str, object]:
        """The key and the formula's code: branches with equal structure compute equal outputs from equal inputs."""
        function = self.formula.function
        return self.key, getattr(function, "__func__", function)


@dataclass(frozen=True)
class Reason:
    """The reason why a term does not run in a cheaper way, recorded by the code that decides it.

    Attributes:
        adapter: the adapter of the term; None for all terms of the site.
        site: path of the site.
        why: a clause that begins with a verb for an adapter, a whole sentence for a site.
    """

    adapter: str | None
    site: str
    why: str

    def __str__(self) -> str:
        return self.why if self.adapter is None else f"'{self.adapter}' {self.why}"


class RankPolicy(enum.StrEnum):
    """The ranks that the pair of a site may have at run time, up to its room."""

    FROM_ZERO = "from zero"
    FROM_ONE = "from one"
    """An idle pair has one component of zeros."""
    FIXED = "fixed"
    """Always the full room, padded with zeros."""


@dataclass(frozen=True)
class SitePlan:
    """The slots of a site.

    Attributes:
        room: role -> its room: the largest rank, for the pair and scales along its rank; the size of the blocks, for
            input transforms; else 1. An absent role has no slot.
        reasons: why the weight is bound.
        ranks: the ranks that the pair may have, by the target's dialect.
        placed: whether rows of a batch may have different slots, so that slots have a first axis of places.
        row_weights: whether rows may also have different whole weights, as in a small layer that adapters replace.
    """

    site: Site
    room: Mapping[str, int] = field(default_factory=dict)
    branches: tuple[BranchSlot, ...] = ()
    reasons: tuple[Reason, ...] = ()
    ranks: RankPolicy = RankPolicy.FROM_ZERO
    placed: bool = False
    row_weights: bool = field(default=False, compare=False)

    def why_shared(self, role: str) -> str:
        """Return why all rows of a batch share a role's slot; empty if rows may have different tensors."""
        own = self.row_weights and role == operands.WEIGHT
        return "" if own else ROLES[role].why_shared

    @property
    def empty(self) -> bool:
        """Whether the site has no slots."""
        return not (self.room or self.branches)

    @property
    def rank(self) -> int:
        """The largest rank that fits; 0 if there is no pair."""
        return self.room.get(operands.A, 0)

    @property
    def least_rank(self) -> int:
        """The smallest rank that the pair may have; smaller pairs are padded with zeros."""
        if self.ranks is RankPolicy.FIXED:
            return self.rank
        return min(self.rank, 1) if self.ranks is RankPolicy.FROM_ONE else 0

    @property
    def bound(self) -> bool:
        """Whether the weight itself has a slot."""
        return operands.WEIGHT in self.room

    def roles(self) -> list[tuple[SlotRole, int]]:
        """Return the roles that have slots and their room, in the table's order."""
        return [(role, self.room[role.name]) for role in ROLES.values() if role.name in self.room]

    @property
    def has_placed_branches(self) -> bool:
        """Whether rows of a batch may have different branches; either all branches of a site allow it or none."""
        return any(slot.axes is not None for slot in self.branches)

    @property
    def without_branches(self) -> "SitePlan":
        """The plan without branch slots."""
        return replace(self, branches=())

    def slot_roles(self) -> tuple[str, ...]:
        """Return the roles of all slots, including branches."""
        return (*(role.name for role, _ in self.roles()), *self.branch_shapes())

    def branch_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return role -> shape of the strengths and parameters of all branches.

        A ``once`` site has no strengths of its own; the branches that read its values have them.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        for index, slot in enumerate(self.branches):
            strength, *params = branch_roles(index, len(slot.params))
            shapes |= {} if self.site.kind is SiteKind.ONCE else {strength: (1,)}
            shapes |= dict(zip(params, slot.params.values(), strict=True))
        return shapes


@dataclass(frozen=True, eq=False)
class BranchFill:
    """The content of a branch's slot: its strength t and its parameters."""

    strength: Tensor
    params: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class SiteSlots:
    """The tensors of a site's slots, in slot layout (``lorac.ir.slots.layouts``).

    Attributes:
        tensors: role -> the tensor in its slot; an idle pair has rank 0.
        branches: one fill per branch slot, in the plan's order; None for an idle slot.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    branches: tuple[BranchFill | None, ...] = ()

    @functools.cached_property
    def stages(self) -> Mapping[Stage, tuple[tuple[SlotRole, Tensor], ...]]:
        """Stage -> the roles that act in it and their tensors, in the table's order."""
        found: dict[Stage, tuple[tuple[SlotRole, Tensor], ...]] = dict.fromkeys(Stage, ())
        for role in ROLES.values():
            if role.name in self.tensors:
                found[role.stage] += ((role, self.tensors[role.name]),)
        return found

    @functools.cached_property
    def leaves_base(self) -> bool:
        """Whether the base's product and bias do not change, and at most a low-rank pair is added."""
        return all(stage.of_pair for stage, present in self.stages.items() if present)

    def named(self) -> dict[str, Tensor]:
        """Return role -> tensor for all roles, including branches."""
        tensors = dict(self.tensors)
        for index, fill in enumerate(self.branches):
            if fill is not None:
                roles = branch_roles(index, len(fill.params))
                tensors |= dict(zip(roles, (fill.strength, *fill.params), strict=True))
        return tensors

    @staticmethod
    def of_named(tensors: Mapping[str, Tensor], plan: SitePlan) -> "SiteSlots":
        """Build the slots from ``named``'s result."""
        fills = []
        for index, slot in enumerate(plan.branches):
            strength, *params = (tensors[role] for role in branch_roles(index, len(slot.params)))
            fills.append(BranchFill(strength, tuple(params)))
        return SiteSlots({name: tensor for name, tensor in tensors.items() if name in ROLES}, tuple(fills))


@dataclass(frozen=True, eq=False)
class BranchTerm:
    """One adapter's branch at one site: the slot it needs, and its parameters."""

    slot: BranchSlot
    params: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class PreparedAdapter:
    """An adapter in its normal forms, ready to fill slots.

    Attributes:
        changes: site path -> the change in a weight form.
        branches: site path -> branch term.
        truncatable: the power by which the method's scale falls with the rank (``LowRank.truncated``); None if
            ``Active(rank=…)`` may not truncate it.
        reasons: why terms have no cheaper form.
        sizes: path of a layer that the adapter replaces -> the outputs of the new layer, or its tokens for an
            embedding.
        labels: the names of a classifier's outputs, if its file has them.
        invocation: the token ids from which on the adapter acts; empty: it acts on every token.
        prefix: the adapter's virtual tokens, if it prepends any to a sequence.
    """

    changes: Mapping[str, Change]
    branches: Mapping[str, BranchTerm] = field(default_factory=dict)
    truncatable: float | None = None
    reasons: tuple[Reason, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    invocation: tuple[int, ...] = ()
    prefix: Prefix | None = None

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the adapter."""
        own = [tensor for change in self.changes.values() for tensor in list_tensors(change)]
        own += [] if self.prefix is None else [self.prefix.rows]
        return [*own, *(tensor for term in self.branches.values() for tensor in term.params)]

    @property
    def paths(self) -> frozenset[str]:
        """Every site that the adapter touches."""
        return frozenset(self.in_order())

    def in_order(self) -> tuple[str, ...]:
        """Return every site that the adapter touches, in the adapter's order, changes before branches."""
        return tuple(dict.fromkeys((*self.changes, *self.branches)))


def list_layers(plans: Iterable[SitePlan]) -> list[str]:
    """Return the paths of the modules whose forward uses the planned weights, except the model's root."""
    owners = (plan.site.path if plan.site.is_layer else plan.site.within for plan in plans)
    return [path for path in dict.fromkeys(owners) if path]
