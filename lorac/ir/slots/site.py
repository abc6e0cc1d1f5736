"""Slots: what of a site can be replaced at run time, and the one function that computes an adapted site from them.

A ``SitePlan`` says which slots a site has; it is fixed at compile time. A ``SiteSlots`` holds the tensors that fill
them for one choice of adapters. ``run_site`` is the meaning of both, in torch ops: the eager backend calls it, the
other backends trace it (``lorac.ir.lower``), so no backend has a formula of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from lorac.ir.algebra.changes import Change
from lorac.ir.host.sites import Site

Tensor = torch.Tensor


@dataclass(frozen=True)
class BranchSlot:
    """Room for one branch adapter of a given structure.

    Attributes:
        key: the structure: variant name, hyper-parameters, parameter shapes. Adapters with equal keys fit.
        formula: (x, y, params, ctx) -> y'.
        params: parameter name -> shape.
        emits: names of the extra outputs the branch gives.
        reads: names of the program values it reads (``lorac.ir.slots.reads``).
    """

    key: str
    formula: Callable[..., Tensor] = field(compare=False)
    params: Mapping[str, tuple[int, ...]] = field(compare=False)
    emits: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()


@dataclass(frozen=True)
class SitePlan:
    """Which slots a site has.

    Attributes:
        site: the site.
        rank: largest rank that fits, 0 for no low-rank slot.
        c, d: whether the output scale and input scale exist.
        t: size of the blocks of the input transform, 0 for no such slot.
        g, h: whether the pair has a scale between its halves, and one behind them.
        bound: the weight itself is a slot.
        bias: so is the bias: a slot (out,) that holds the whole new bias.
        branches: room for branches.
        reasons: why nothing cheaper was chosen.
    """

    site: Site
    rank: int = 0
    c: bool = False
    d: bool = False
    t: int = 0
    g: bool = False
    h: bool = False
    bound: bool = False
    bias: bool = False
    branches: tuple[BranchSlot, ...] = ()
    reasons: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Nothing can be replaced here."""
        return not (self.rank or self.c or self.d or self.t or self.bias or self.bound or self.branches)


@dataclass(frozen=True, eq=False)
class BranchFill:
    """One branch in its slot: strength t and its parameters."""

    strength: Tensor
    params: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class SiteSlots:
    """The tensors in a site's slots, in slot layout (``lorac.ir.slots.layouts``). None: the slot is absent.

    Attributes:
        a, b: low-rank pair; rank 0 when nothing is active.
        c: output scale (out,).
        d: input scale (in,).
        t: input transform, blocks (n, k, k).
        g: scale (R,) between the halves of the pair; h: scale (out,) behind them.
        weight, bias: the bound weight and its bias.
        branches: one fill per branch slot, in the plan's order; None where the slot is idle.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    c: Tensor | None = None
    d: Tensor | None = None
    t: Tensor | None = None
    g: Tensor | None = None
    h: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    branches: tuple[BranchFill | None, ...] = ()

    @property
    def leaves_base(self) -> bool:
        """The base's own product and bias stay as they are; a low-rank branch may come beside."""
        return all(slot is None for slot in (self.weight, self.bias, self.c, self.d, self.t))

    def named(self) -> dict[str, Tensor]:
        """Slot role -> tensor; a branch's parameters are ``branch<i>.<j>``, its strength ``branch<i>.t``."""
        found = {role: getattr(self, role) for role in ("a", "b", "c", "d", "t", "g", "h", "weight", "bias")}
        tensors = {role: tensor for role, tensor in found.items() if tensor is not None}
        for i, fill in enumerate(self.branches):
            if fill is None:
                continue
            tensors[f"branch{i}.t"] = fill.strength
            tensors |= {f"branch{i}.{j}": tensor for j, tensor in enumerate(fill.params)}
        return tensors

    @staticmethod
    def of_named(tensors: Mapping[str, Tensor], plan: SitePlan) -> SiteSlots:
        """The inverse of ``named``."""
        branches = tuple(
            BranchFill(tensors[f"branch{i}.t"], tuple(tensors[f"branch{i}.{j}"] for j in range(len(slot.params))))
            for i, slot in enumerate(plan.branches)
        )
        plain = {role: tensor for role, tensor in tensors.items() if not role.startswith("branch")}
        return SiteSlots(**plain, branches=branches)


@dataclass(frozen=True, eq=False)
class BranchTerm:
    """One adapter's branch at one site: the slot it needs and its parameters."""

    slot: BranchSlot
    params: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Prepared:
    """An adapter in its normal forms, ready to fill slots.

    Attributes:
        changes: site path -> the change in a weight form.
        branches: site path -> branch term.
        truncatable: None where ``Active(rank=…)`` may not cut it; else the power by which its scale falls with the
            rank (``LowRank.truncated``).
    """

    changes: Mapping[str, Change]
    branches: Mapping[str, BranchTerm] = field(default_factory=dict)
    truncatable: float | None = None

    @property
    def paths(self) -> frozenset[str]:
        """Every site it touches."""
        return frozenset(self.changes) | frozenset(self.branches)
