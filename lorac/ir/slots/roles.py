"""The table of slot roles: what of a site can be replaced, one row per kind of tensor.

An adapted site computes, of its input x and with the base's weight W and bias b,

    ``y' = c∘(W·((d∘x)·T)) + h∘(((x·A)∘g)·B) + bias``

and every letter of it is a role. A row (``lorac.ir.slots.role``) says all there is to know of one: where it acts and
by which function, what it holds where nothing is active, its shape, what admits it, what it costs, how people see it.
Everything else is derived: plans have room for roles, changes fill them, ``run_site`` applies them stage by stage,
graphs get an input for each, files store them, reports name them and the self-test shakes them. A new role is a new
row, and a reduction that makes changes carrying it; nothing else lists roles.

The letters themselves are ``lorac.ir.algebra.operands``, since the algebra knows how changes of the same letters merge
and add up. Tensors are in slot layout (``lorac.ir.slots.layouts``) unless it is said otherwise. What branches need is
named by the functions at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from lorac.ir.algebra import operands as letters
from lorac.ir.algebra.changes import Change, LowRank, identity_blocks
from lorac.ir.sites import Site, SiteKind
from lorac.ir.slots.layouts import SiteLayout
from lorac.ir.slots.role import AddNoise, NoiseScale, Shape, SlotRole, SlotSpec, Stage

Tensor = torch.Tensor

# ── What the rows are made of ────────────────────────────────────────────────────────────────────────────────────────
_SHARE = 0.3
"""How much of its site's output the noise in a pair is, and how far it scales a weight's rows and columns."""
_SPREAD = 0.1
"""How far noise is from neutral in scales, transforms and biases."""


def _per_output(place: SlotSpec) -> Shape:
    return (place.site.out_features,)


def _per_input(place: SlotSpec) -> Shape:
    return (place.site.in_features,)


def _per_rank(place: SlotSpec) -> Shape:
    return (place.size,)


def _blocks(place: SlotSpec) -> Shape:
    size = int(place.size)
    return (place.site.in_features // size, size, size)


def _weight(place: SlotSpec) -> Tensor:
    assert place.weight is not None
    return place.layout.slot_weight(place.weight())


def _weight_shape(place: SlotSpec) -> Shape:
    return tuple(_weight(place).shape)


def _zeros(role: SlotRole, place: SlotSpec) -> Tensor:
    return torch.zeros(role.shape(place), dtype=role.dtype(place.site))


def _ones(role: SlotRole, place: SlotSpec) -> Tensor:
    return torch.ones(role.shape(place), dtype=role.dtype(place.site))


def _identity(role: SlotRole, place: SlotSpec) -> Tensor:
    return identity_blocks(place.site.in_features, int(place.size), role.dtype(place.site)).contiguous()


def _base_weight(_: SlotRole, place: SlotSpec) -> Tensor:
    return _weight(place)


def _base_bias(role: SlotRole, place: SlotSpec) -> Tensor:
    return _zeros(role, place) if place.bias is None else place.bias


def _gaussian_noise(spread: Callable[[NoiseScale], float]) -> AddNoise:
    """Noise of a standard deviation about what the slot holds."""

    def noise(tensor: Tensor, around: NoiseScale, generator: torch.Generator) -> None:
        tensor.add_(spread(around) * torch.randn(tensor.shape, generator=generator).to(tensor.dtype))

    return noise


def _small_spread(_: NoiseScale) -> float:
    return _SPREAD


def _spread_of_a(around: NoiseScale) -> float:
    return float(around.site.in_features**-0.5)


def _spread_of_b(around: NoiseScale) -> float:
    """Such that the pair answers a share of what the weight does."""
    return float(_SHARE * around.typical / (_spread_of_a(around) * around.rank**0.5))


def _scale_rows_and_columns(weight: Tensor, around: NoiseScale, generator: torch.Generator) -> None:
    """Scale every row and column its own way: one pass, where noise per value would take many.

    Signs stay: a variance must not become negative.
    """
    for axis in (0, weight.dim() - 1):
        shape = [1] * weight.dim()
        shape[axis] = weight.shape[axis]
        weight.mul_(torch.exp(_SHARE * torch.randn(shape, generator=generator)).to(weight.dtype))


def _count_down_flops(site: Site, a: Tensor) -> int:
    """x·A: rows of a table cost nothing."""
    return 0 if site.kind is SiteKind.EMBEDDING else 2 * a.numel()


def _count_product_flops(site: Site, matrix: Tensor) -> int:
    return 2 * matrix.numel()


def _count_no_flops(site: Site, weight: Tensor) -> int:
    """The product is the base's, with other numbers."""
    return 0


def _apply_down(layout: SiteLayout, x: Tensor, a: Tensor) -> Tensor:
    return layout.down(x.to(a.dtype) if x.is_floating_point() else x, a)


def _join_columns(parts: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
    """Matrices (…, R) and (K, N) along their last axis; there is nothing of sites without one."""
    return torch.cat([part for part in parts if part is not None], dim=-1)


def _join_block_diagonal(parts: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
    """B's (R, N), each in the rows of its own A and the columns of its own outputs."""
    some = next(part for part in parts if part is not None)
    ranks = [0 if part is None else part.shape[0] for part in parts]
    packed = some.new_zeros(sum(ranks), sum(sizes))
    row = column = 0
    for part, rank, size in zip(parts, ranks, sizes, strict=True):
        if part is not None:
            packed[row : row + rank, column : column + size] = part
        row, column = row + rank, column + size
    return packed


def _join_scales(parts: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
    """Vectors of scales (out,); ones for sites without one."""
    some = next(part for part in parts if part is not None)
    return torch.cat([some.new_ones(size) if part is None else part for part, size in zip(parts, sizes, strict=True)])


# ── The table ────────────────────────────────────────────────────────────────────────────────────────────────────────
_TABLE = (
    SlotRole(
        name=letters.A,
        letter="A",
        meaning="first half of the low-rank pair",
        stage=Stage.DOWN,
        apply=_apply_down,
        shape=lambda place: place.layout.shape_a(place.size),
        start=_zeros,
        noise=_gaussian_noise(_spread_of_a),
        flops=_count_down_flops,
        into_slot=lambda layout, a: layout.slot_a(a),
        unit="rank {}",
        rank_axis=1,
        reserve="rank",
        transposed=True,
        packed=_join_columns,
    ),
    SlotRole(
        name=letters.B,
        letter="B",
        meaning="its second half",
        stage=Stage.UP,
        apply=lambda layout, u, b: layout.up(u, b),
        shape=lambda place: place.layout.shape_b(place.size),
        start=_zeros,
        noise=_gaussian_noise(_spread_of_b),
        flops=_count_product_flops,
        into_slot=lambda layout, b: layout.slot_b(b),
        unit="rank {}",
        rank_axis=0,
        reserve="rank",
        transposed=True,
        packed=_join_block_diagonal,
    ),
    SlotRole(
        name=letters.C,
        letter="c",
        meaning="scale of the base's outputs",
        stage=Stage.OUTPUT,
        apply=lambda layout, y, c: y * layout.per_output(c).to(y.dtype),
        shape=_per_output,
        start=_ones,
        noise=_gaussian_noise(_small_spread),
        reserve="scales",
        packed=_join_scales,
    ),
    SlotRole(
        name=letters.D,
        letter="d",
        meaning="scale of the base's inputs",
        stage=Stage.INPUT,
        apply=lambda layout, x, d: (x * layout.per_input(d)).to(x.dtype),
        shape=_per_input,
        start=_ones,
        noise=_gaussian_noise(_small_spread),
        alone="its input is scaled before its product",
    ),
    SlotRole(
        name=letters.T,
        letter="T",
        meaning="block-diagonal transform of the base's inputs",
        stage=Stage.INPUT,
        apply=lambda layout, x, t: layout.through(x.to(t.dtype), t).to(x.dtype),
        shape=_blocks,
        start=_identity,
        noise=_gaussian_noise(_small_spread),
        flops=_count_product_flops,
        sized=lambda t: t.shape[-1],
        unit="input transforms in blocks of {}",
        alone="its input is transformed before its product",
    ),
    SlotRole(
        name=letters.G,
        letter="g",
        meaning="scale between the halves of a pair whose A layers share",
        stage=Stage.BETWEEN,
        apply=lambda layout, u, g: u * layout.per_rank(g),
        shape=_per_rank,
        start=_ones,
        noise=_gaussian_noise(_small_spread),
        unit="rank {}",
        rank_axis=0,
        alone="its A is one that sites have in common already",
    ),
    SlotRole(
        name=letters.H,
        letter="h",
        meaning="scale behind a pair whose B layers share",
        stage=Stage.BEHIND,
        apply=lambda layout, u, h: u * layout.per_output(h),
        shape=_per_output,
        start=_ones,
        noise=_gaussian_noise(_small_spread),
        packed=_join_scales,
    ),
    SlotRole(
        name=letters.WEIGHT,
        letter="W",
        meaning="merged weight",
        stage=Stage.PRODUCT,
        apply=lambda layout, x, weight: layout.bound(x, weight, None),
        shape=_weight_shape,
        start=_base_weight,
        noise=_scale_rows_and_columns,
        flops=_count_no_flops,
        into_slot=lambda layout, matrix: layout.slot_weight(matrix),
        of_base=True,
        reserve="weights",
        packed=_join_columns,
    ),
    SlotRole(
        name=letters.BIAS,
        letter="b",
        meaning="bias",
        stage=Stage.BIAS,
        apply=lambda layout, y, bias: y + layout.per_output(bias).to(y.dtype),
        shape=_per_output,
        start=_base_bias,
        noise=_gaussian_noise(_small_spread),
        of_base=True,
        reserve="scales",
        packed=_join_columns,
    ),
)

ROLES: dict[str, SlotRole] = {role.name: role for role in _TABLE}
"""Name -> role, in the order in which they are listed, bound and, within a stage, applied."""


def tensors_by_role(change: LowRank) -> dict[str, Tensor]:
    """Role -> what a low-rank change brings to it, in the table's order; a pair of rank 0 brings nothing."""
    pair = {letters.A: change.a, letters.B: change.b} if change.rank else {}
    given = {**pair, **change.parts}
    return {name: given[name] for name in ROLES if name in given}


def roles_needed(change: Change) -> tuple[SlotRole, ...]:
    """The roles that a change needs, in the table's order; what can be folded into its pair needs none."""
    whole = {letters.WEIGHT} if not isinstance(change, LowRank) else tensors_by_role(change).keys() - letters.FOLDABLE
    needed = {*whole, *((letters.BIAS,) if change.e is not None else ())}
    return tuple(role for role in ROLES.values() if role.name in needed)


def acts_at(change: LowRank, stage: Stage) -> bool:
    """Whether a change has a part that acts at a stage."""
    return any(ROLES[name].stage is stage for name in change.parts)


def keeps_base_weight(layout: SiteLayout, change: LowRank) -> bool:
    """Whether a change needs no weight of its own: the site is called, and has an axis where inputs are changed."""
    if layout.site.within is not None:
        return not tensors_by_role(change)
    return layout.has_input_axis or not acts_at(change, Stage.INPUT)


def apply_stage(stage: Stage, layout: SiteLayout, value: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """A value behind the roles of one stage, of those there are tensors for."""
    for role in ROLES.values():
        if role.stage is stage and role.name in tensors:
            value = role.apply(layout, value, tensors[role.name])
    return value


# ── Names ────────────────────────────────────────────────────────────────────────────────────────────────────────────
_BRANCH, _STRENGTH = "branch", "t"


def slot_name(path: str, role: str) -> str:
    """The public name of a site's slot, which survives into the emitted program."""
    return f"{path}:{role}"


def branch_name(index: int) -> str:
    """A branch slot of a site, by its place in the plan."""
    return f"{_BRANCH}{index}"


def strength_role(branch: str) -> str:
    """The role of a branch's strength."""
    return f"{branch}.{_STRENGTH}"


def parameter_role(branch: str, position: int) -> str:
    """The role of one of a branch's parameters, by its place among them."""
    return f"{branch}.{position}"


def is_strength(role: str) -> bool:
    """Whether a role is a branch's strength."""
    return role.startswith(_BRANCH) and role.endswith(f".{_STRENGTH}")
