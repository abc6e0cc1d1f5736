"""The dialect of a target: the ops that it computes, and the rules for writing its programs."""

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
    """The way in which a call skips an inactive branch."""

    NONE = "none"
    """The program of the call does not contain it."""
    IF = "if"
    """A conditional op encloses it: an idle branch is not computed."""
    WHERE = "where"
    """It is computed, and its result selected by its strength, so that zeros cannot turn into NaN."""


@dataclass(frozen=True, kw_only=True)
class Dialect(Generic[RewriteT_co]):
    """Ops, dtypes and rewrites of a target; pipelines and emission depend on nothing else of the target.

    The type parameter is the class of passes over an emitted program; ``AnyDialect`` stands for every dialect.

    Attributes:
        claims: the ops that the target computes; None if no program is emitted for the target.
        passes: passes from level expanded to level target, in order.
        early_rewrites: passes over the emitted program before its clean-up, in order.
        late_rewrites: passes over the cleaned-up program, in order.
        gates: the way in which calls skip inactive branches.
        ranks: policy per kind of site, where the pairs' ranks do not follow ``FROM_ZERO``.
        dtypes: floating-point dtypes of the target, best first; a model of another dtype is cast to the first one.
        fuses_projections: whether sites that read the same input are computed as one product.
        rows: whether each row of a batch may have its own slots.
        why_shared: kind of site for which all rows share slots -> the reason, as a clause.
        why_branches_shared: the reason why all rows share the slots of branches, as a clause; empty if they do not.
        functions: whether an unclaimed op may be used if ONNX defines it as a function of other ops.
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
        """Return the policy for the rank of a site's pair."""
        return self.ranks.get(site.kind, RankPolicy.FROM_ZERO)

    @property
    def emits(self) -> bool:
        """Whether a program is emitted for the target; the program runs without the model."""
        return self.claims is not None


AnyDialect = Dialect[object]


def refuse_unclaimed(dialect: AnyDialect, found: Sequence[str]) -> None:
    """Raise ``Unavailable`` if the program has ops that the target does not compute; name each with its caller."""
    if found:
        raise Unavailable(
            f"{dialect.name} does not compute {'; nor '.join(found)}",
            next_step="use target='eager', or another implementation of that part of the model",
        )
