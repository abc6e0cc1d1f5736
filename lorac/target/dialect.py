"""The dialect of a target: which ops it computes, and how a program for it is written."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from lorac.errors import Unavailable
from lorac.ir.graph.passes import Pass
from lorac.ir.sites.site import Site, SiteKind
from lorac.ir.slots.plans import RankPolicy

ClaimedOps = frozenset[tuple[str, str]]
"""Pairs of domain and op; the default domain is ``""``."""
RewriteT_co = TypeVar("RewriteT_co", covariant=True)


class BranchGate(enum.Enum):
    """How a call leaves out a branch that is off."""

    NONE = "none"
    """The program of the call does not contain it."""
    IF = "if"
    """A conditional op encloses it: an idle branch is not computed."""
    WHERE = "where"
    """It is computed, and its result selected by its strength, so that zeros cannot turn into NaN."""


@dataclass(frozen=True, kw_only=True)
class Dialect(Generic[RewriteT_co]):
    """Ops, dtypes and rewrites of a target. Pipelines and emission know nothing else about it.

    It is generic in the passes that edit an emitted program; ``AnyDialect`` stands for every dialect.

    Attributes:
        claims: the ops that the target computes; None where no program is emitted for it.
        passes: passes from level expanded to level target, in order.
        early_rewrites: passes over the emitted program before its clean-up, in order.
        late_rewrites: passes over the cleaned-up program, in order.
        gates: how branches that are off are left out.
        ranks: kinds of sites whose pairs have other ranks than ``FROM_ZERO``.
        dtypes: floating-point dtypes that the target computes in, best first; a model in another is cast to the first.
        fuses_projections: whether sites that read the same input are computed as one.
        rows: whether rows of a batch may have slots of their own.
        why_shared: kinds of sites whose slots rows share -> why, as a clause.
        why_branches_shared: why the slots of branches are not among them, as a clause; empty where they are.
        functions: whether an op that is not claimed may be used where ONNX defines it as a function of other ops.
    """

    name: str
    claims: ClaimedOps | None = None
    passes: tuple[Pass, ...] = ()
    early_rewrites: tuple[RewriteT_co, ...] = ()
    late_rewrites: tuple[RewriteT_co, ...] = ()
    gates: BranchGate = BranchGate.IF
    ranks: Mapping[SiteKind, RankPolicy] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
    fuses_projections: bool = True
    rows: bool = False
    why_shared: Mapping[SiteKind, str] = field(default_factory=dict)
    why_branches_shared: str = ""
    functions: bool = True

    def ranks_at(self, site: Site) -> RankPolicy:
        """Return which ranks a site's pair may have."""
        return self.ranks.get(site.kind, RankPolicy.FROM_ZERO)

    @property
    def emits(self) -> bool:
        """Whether a program is emitted for the target, which then runs without the model."""
        return self.claims is not None


AnyDialect = Dialect[object]


def refuse_unclaimed(dialect: AnyDialect, found: Sequence[str]) -> None:
    """Raise ``Unavailable`` if there are ops that a target does not compute, each with the place that calls it."""
    if found:
        raise Unavailable(
            f"{dialect.name} does not compute {'; nor '.join(found)}",
            next_step="target='eager' runs it; another implementation of that part of the model may be exported",
        )
