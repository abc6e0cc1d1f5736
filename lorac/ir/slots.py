"""Slots: what of a site can be replaced at run time, and the one function that computes an adapted site from them.

A ``SitePlan`` says which slots a site has; it is fixed at compile time. A ``SiteSlots`` holds the tensors that fill
them for one choice of adapters. ``run_site`` is the meaning of both, in torch ops: the eager backend calls it, the
other backends trace it (``lorac.ir.lower``), so no backend has a formula of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lorac.errors import NeedsRecompile
from lorac.ir.forms import Dense, LowRank, Sparse, SparseSum, Value, merge, merge_bias
from lorac.ir.kinds import LinearKind, kind_of
from lorac.ir.sites import Site
from lorac.ir.types import Params

Tensor = torch.Tensor


@dataclass(frozen=True)
class BranchSlot:
    """Room for one branch adapter of a given structure.

    Attributes:
        key: the structure: variant name, hyper-parameters, parameter shapes. Adapters with equal keys fit.
        formula: (x, y, params, ctx) -> y'.
        params: parameter name -> shape.
        emits: names of the extra outputs the branch gives.
    """

    key: str
    formula: Callable[..., Tensor] = field(compare=False)
    params: Mapping[str, tuple[int, ...]] = field(compare=False)
    emits: tuple[str, ...] = ()


@dataclass(frozen=True)
class SitePlan:
    """Which slots a site has.

    Attributes:
        site: the site.
        rank: largest rank that fits, 0 for no low-rank slot.
        c, d, e: whether the output scale, input scale and shift exist.
        bound: the weight itself is a slot.
        bound_bias: so is the bias.
        branches: room for branches.
        reasons: why nothing cheaper was chosen.
    """

    site: Site
    rank: int = 0
    c: bool = False
    d: bool = False
    e: bool = False
    bound: bool = False
    bound_bias: bool = False
    branches: tuple[BranchSlot, ...] = ()
    reasons: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Nothing can be replaced here."""
        return not (self.rank or self.c or self.d or self.e or self.bound or self.branches)


@dataclass(frozen=True, eq=False)
class BranchFill:
    """One branch in its slot: strength t and its parameters."""

    strength: Tensor
    params: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class SiteSlots:
    """The tensors in a site's slots, in slot layout (``lorac.ir.kinds``). None: the slot is absent.

    Attributes:
        a, b: low-rank pair; rank 0 when nothing is active.
        c, e: output scale and shift (out,).
        d: input scale (in,).
        weight, bias: the bound weight and its bias.
        branches: one fill per branch slot, in the plan's order; None where the slot is idle.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    c: Tensor | None = None
    d: Tensor | None = None
    e: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    branches: tuple[BranchFill | None, ...] = ()

    def named(self) -> dict[str, Tensor]:
        """Slot role -> tensor; a branch's parameters are ``branch<i>.<j>``, its strength ``branch<i>.t``."""
        found = {role: getattr(self, role) for role in ("a", "b", "c", "d", "e", "weight", "bias")}
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


class Ctx:
    """What a branch sees of its surroundings (``lorac.variants.base.Context``)."""

    def __init__(
        self,
        site: Site,
        *,
        training: bool = False,
        generator: torch.Generator | None = None,
        value: Callable[[str], Tensor] | None = None,
        emit: Callable[[str, Tensor], None] | None = None,
    ) -> None:
        self.site, self.training, self.generator = site, training, generator
        self._value, self._emit = value, emit

    def value(self, name: str) -> Tensor:
        """A value of the program, by name."""
        if self._value is None:
            raise KeyError(name)
        return self._value(name)

    def emit(self, name: str, tensor: Tensor) -> None:
        """An extra output; dropped where nobody asked for it."""
        if self._emit is not None:
            self._emit(name, tensor)


def run_site(
    plan: SitePlan,
    slots: SiteSlots,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    ctx: Ctx | None = None,
    block: Tensor | None = None,
    down: Tensor | None = None,
) -> Tensor:
    """The output of an adapted site.

    Args:
        plan, slots: what the site has and what fills it.
        x: its input (ids for embeddings).
        weight: its stored base weight; bias: its base bias.
        block: the output of a block, where the site is one.
        ctx: handed to branches.
        down: x·A where it was computed together with other sites' (shared-input packing).
    """
    kind = kind_of(plan.site)
    base = block
    if base is None and (slots.weight is None or slots.branches):
        assert weight is not None
        base = kind.base(x, weight, bias)
    y = _weighted_output(kind, slots, x, weight, bias, base)
    y = low_rank(plan.site, slots, x, y, down)
    for slot, fill in zip(plan.branches, slots.branches, strict=True):
        if fill is None:
            continue
        assert base is not None
        y = y + fill.strength * (run_branch(plan.site, slot, fill, x, base, ctx) - base)
    return y


def _weighted_output(
    kind: LinearKind, slots: SiteSlots, x: Tensor, weight: Tensor | None, bias: Tensor | None, base: Tensor | None
) -> Tensor:
    if slots.weight is not None:
        return kind.bound(x, slots.weight, slots.bias if slots.bias is not None else bias)
    if slots.d is None:
        assert base is not None
        return base
    scale = kind.per_input(slots.d)
    assert scale is not None
    assert weight is not None
    return kind.base(x * scale, weight, bias)


def low_rank(site: Site, slots: SiteSlots, x: Tensor, y: Tensor, down: Tensor | None = None) -> Tensor:
    """``c∘y + e + (x·A)·B`` in the dtype of y; the factors' dtype decides where the branch is computed (PEFT's rule)."""
    kind = kind_of(site)
    if slots.c is not None:
        y = y * kind.per_output(slots.c).to(y.dtype)
    if slots.e is not None:
        y = y + kind.per_output(slots.e).to(y.dtype)
    if slots.a is None or slots.b is None:
        return y
    if down is None:
        down = kind.down(x.to(slots.a.dtype) if x.is_floating_point() else x, slots.a)
    return y + kind.up(down, slots.b).to(y.dtype)


def run_branch(site: Site, slot: BranchSlot, fill: BranchFill, x: Tensor, y: Tensor, ctx: Ctx | None) -> Tensor:
    """y' of one branch, in the dtype of y."""
    params = Params(**dict(zip(slot.params, fill.params, strict=True)))
    dtype = next((t.dtype for t in fill.params if t.is_floating_point()), y.dtype)
    return slot.formula(x.to(dtype), y.to(dtype), params, ctx or Ctx(site)).to(y.dtype)


def fill_site(plan: SitePlan, value: Value | None, base: Callable[[], Tensor], bias: Tensor | None) -> SiteSlots:
    """The tensors of one composed value in a site's weight-form slots (branches are filled by ``with_branches``).

    Args:
        plan: the site's plan.
        value: what the active adapters come to, or None for the base.
        base: reads W (out, in); called where the plan binds the weight.
        bias: the base's bias.

    Raises:
        NeedsRecompile: the value does not fit the plan.
    """
    misfit = does_not_fit(plan, value)
    if misfit:
        raise NeedsRecompile(f"'{plan.site.path}' {misfit}")
    kind = kind_of(plan.site)
    tensors: dict[str, Tensor | None] = {}
    low = value if isinstance(value, LowRank) and plan.rank >= value.rank and plan.rank > 0 else None
    if low is not None and not _scales_fit(plan, low):
        low = None
    if plan.bound:
        merged = None if low is not None else value
        matrix = base() if merged is None else merge(merged, base())
        tensors["weight"] = kind.layout_weight(matrix)
        if plan.bound_bias:
            new_bias = bias if merged is None else merge_bias(merged, bias)
            tensors["bias"] = new_bias if new_bias is not None else matrix.new_zeros(matrix.shape[0])
    tensors |= _low_rank_slots(plan, low)
    return SiteSlots(**tensors)  # type: ignore[arg-type]


def does_not_fit(plan: SitePlan, value: Value | None) -> str | None:
    """Why a value cannot be held by the plan's slots, or None."""
    if value is None:
        return None
    if plan.bound:
        shifts = value.e is not None and not plan.bound_bias
        return "has no slot for a bias" if shifts else None
    if isinstance(value, Dense | Sparse | SparseSum):
        return "has no slot for a whole weight"
    if value.rank > plan.rank:
        return f"holds rank {plan.rank}, not {value.rank}"
    for name in ("c", "d", "e"):
        if getattr(value, name) is not None and not getattr(plan, name):
            return f"has no slot '{name}'"
    return None


def _scales_fit(plan: SitePlan, value: LowRank) -> bool:
    return all(getattr(value, name) is None or getattr(plan, name) for name in ("c", "d", "e"))


def _low_rank_slots(plan: SitePlan, value: LowRank | None) -> dict[str, Tensor | None]:
    kind, site = kind_of(plan.site), plan.site
    dtype = factor_dtype(site.dtype)
    tensors: dict[str, Tensor | None] = {}
    if plan.rank:
        a = value.a if value is not None else torch.zeros(site.in_features, 0, dtype=dtype)
        b = value.b if value is not None else torch.zeros(0, site.out_features, dtype=dtype)
        tensors |= {"a": kind.layout_a(a).contiguous(), "b": kind.layout_b(b).contiguous()}
    sizes = {"c": (site.out_features, 1.0), "d": (site.in_features, 1.0), "e": (site.out_features, 0.0)}
    for name, (size, neutral) in sizes.items():
        if getattr(plan, name):
            given = getattr(value, name) if value is not None else None
            tensors[name] = given if given is not None else torch.full((size,), neutral, dtype=dtype)
    return tensors


def factor_dtype(base: torch.dtype) -> torch.dtype:
    """The dtype adapters are held in over a base of ``base`` (PEFT's rule): float32 over half precision."""
    return torch.float32 if base in {torch.float16, torch.bfloat16} else base


@dataclass(frozen=True, eq=False)
class BranchTerm:
    """One adapter's branch at one site: the slot it needs and its parameters."""

    slot: BranchSlot
    params: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Prepared:
    """An adapter in its normal forms, ready to fill slots.

    Attributes:
        values: site path -> weight-form value.
        branches: site path -> branch term.
        truncatable: whether ``Active(rank=…)`` may cut it.
    """

    values: Mapping[str, Value]
    branches: Mapping[str, BranchTerm] = field(default_factory=dict)
    truncatable: bool = False

    @property
    def paths(self) -> frozenset[str]:
        """Every site it touches."""
        return frozenset(self.values) | frozenset(self.branches)


def fill_branches(plan: SitePlan, terms: Sequence[tuple[float, BranchTerm]]) -> tuple[BranchFill | None, ...]:
    """Assign active branch terms, in name order, to the plan's branch slots of equal structure.

    Raises:
        NeedsRecompile: a term finds no free slot.
    """
    fills: list[BranchFill | None] = [None] * len(plan.branches)
    for strength, term in terms:
        free = [i for i, slot in enumerate(plan.branches) if slot.key == term.slot.key and fills[i] is None]
        if not free:
            raise NeedsRecompile(f"'{plan.site.path}' has no free slot for a branch {term.slot.key}")
        sample = next((t for t in term.params if t.is_floating_point()), torch.empty(0))
        fills[free[0]] = BranchFill(sample.new_full((1,), strength), term.params)
    return tuple(fills)


def branch_misfit(plan: SitePlan | None, term: BranchTerm) -> str | None:
    """Why a branch finds no slot in a plan, or None."""
    if plan is not None and any(slot.key == term.slot.key for slot in plan.branches):
        return None
    return f"has no slot for a branch {term.slot.key}"
