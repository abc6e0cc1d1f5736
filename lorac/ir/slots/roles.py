"""The table of slot roles: one row per kind of tensor that can be replaced at a site.

An adapted site with input x, base weight W and base bias b computes

    ``y' = c∘(W·((d∘x)·T)) + h∘(((x·A)∘g)·B) + bias``

where every letter is a role. A row (a ``SlotRole``) says where the role acts and by which function, its neutral value,
its shape, its room, its cost and its symbol. Everything else is derived: plans have room for roles, changes fill them,
``run_site`` applies them stage by stage, graphs get an input for each, files store them, reports name them and the
self-test fills them with noise. A new role is a new row, and a reduction that makes changes with the role; nothing else
lists roles.

The names of roles are ``lorac.ir.algebra.operands``, since the algebra merges and adds changes by operand. Tensors are
in slot layout (``lorac.ir.slots.layouts``) unless stated otherwise. The functions at the end name slots of branches.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lorac.ir.algebra import operands
from lorac.ir.algebra.changes import Change, LowRank, identity_blocks
from lorac.ir.sites.site import Site, SiteKind, cast_floating, factor_dtype
from lorac.ir.slots.layouts import SiteLayout

Size = int | torch.SymInt
Shape = tuple[Size, ...]


class Stage(enum.Enum):
    """The steps of a site's computation in which roles act; roles of one stage act in the table's order."""

    VIRTUAL = "in place of the output, for ids behind the base's"
    INPUT = "on the input of the base's product"
    PRODUCT = "in place of the base's product"
    OUTPUT = "on the output of the base's product"
    DOWN = "as the first half of the pair"
    BETWEEN = "between the halves of the pair"
    UP = "as the second half of the pair"
    AFTER = "after the pair"
    BIAS = "in place of the base's bias"

    @property
    def of_pair(self) -> bool:
        """Whether the stage belongs to the low-rank pair, which leaves the base's product unchanged."""
        return self in {Stage.DOWN, Stage.BETWEEN, Stage.UP, Stage.AFTER}


@dataclass(frozen=True, eq=False, kw_only=True)
class SlotSpec:
    """The properties of a slot on which its role's shape and neutral value depend.

    Attributes:
        size: the rank for roles along the rank, symbolic in a graph; the plan's room for other roles.
        weight: the function that reads W (out, in), for the role of the whole weight; a meta tensor suffices for
            shapes.
        bias: the base's bias (out,), or None.
    """

    layout: SiteLayout
    size: Size = 1
    weight: Callable[[], Tensor] | None = None
    bias: Tensor | None = None

    @property
    def site(self) -> Site:
        """The site."""
        return self.layout.site


@dataclass(frozen=True)
class NoiseScale:
    """Properties of a slot that decide the size of its noise.

    Attributes:
        typical: a typical magnitude of the weight's values.
        rank: the rank of the noise's pair.
    """

    site: Site
    typical: float
    rank: int


AddNoise = Callable[[Tensor, NoiseScale, torch.Generator], None]
"""Function that adds noise to a slot's neutral tensor, in place."""


def gaussian_noise(deviation: Callable[[NoiseScale], float]) -> AddNoise:
    """Return a function that adds Gaussian noise of this deviation to a slot's tensor."""

    def add_noise(tensor: Tensor, scale: NoiseScale, generator: torch.Generator) -> None:
        tensor.add_(deviation(scale) * torch.randn(tensor.shape, generator=generator).to(tensor.dtype))

    return add_noise


_SMALL_NOISE = gaussian_noise(lambda _: 0.1)


@dataclass(frozen=True, eq=False, kw_only=True)
class SlotRole:
    """One kind of slot.

    Attributes:
        name: the role's name in slots, files and changes.
        letter: the role's symbol in reports.
        meaning: a short description.
        stage: the step in which the role acts.
        apply: (layout, value, tensor) -> the value after it. It is linear in the tensor: applied to the tensor's
            difference from neutral it gives the difference that the tensor makes.
        start: (this role, slot) -> its neutral tensor, for a slot without an active adapter; default: ones.
        noise: changes it in the self-test; default: Gaussian noise of deviation 0.1.
        flops: (site, a change's tensor) -> its multiplications and additions per token.
        into_slot: the function that converts a change's tensor to slot layout.
        sized: the size of a change's tensor along something other than the rank, such as that of blocks; else 1.
        unit: a phrase for the role's room, with ``{}`` for the number; empty without a size.
        rank_axis: the axis of a change's tensor that counts components, or None. Room for such a tensor is the largest
            rank of the site's pair, and the rank may differ between calls.
        padded: whether a change's tensor may have fewer rows than the slot; the other rows are zeros.
        of_base: whether the tensor has the base's dtype; otherwise it has the factors' dtype (PEFT's rule).
        reserve: the field of ``Reserve`` that makes room for it; empty if only a bound weight can hold such a change.
        why_shared: why all rows of a batch share such a slot; empty if rows may have different tensors.
        transposed: whether adapters store the transpose of a change's tensor, which reports show.
    """

    name: str
    letter: str
    meaning: str
    stage: Stage
    apply: Callable[[SiteLayout, Tensor, Tensor], Tensor]
    shape: Callable[[SlotSpec], Shape]
    start: Callable[[SlotRole, SlotSpec], Tensor] = lambda role, slot: torch.ones(
        role.shape(slot), dtype=role.dtype(slot.site)
    )
    noise: AddNoise = _SMALL_NOISE
    flops: Callable[[Site, Tensor], int] = lambda _, part: part.numel()
    into_slot: Callable[[SiteLayout, Tensor], Tensor] = lambda _, part: part
    sized: Callable[[Tensor], int] = lambda _: 1
    unit: str = ""
    rank_axis: int | None = None
    padded: bool = False
    of_base: bool = False
    reserve: str = ""
    why_shared: str = ""
    transposed: bool = False

    @property
    def ranked(self) -> bool:
        """Whether the tensor has an axis of the pair's rank."""
        return self.rank_axis is not None

    def room(self, tensor: Tensor) -> int:
        """Return the room that a change's tensor needs."""
        return self.sized(tensor) if self.rank_axis is None else tensor.shape[self.rank_axis]

    @property
    def merged(self) -> bool:
        """Whether the tensor replaces the base's whole weight or bias."""
        return self.stage in {Stage.PRODUCT, Stage.BIAS}

    @property
    def optional(self) -> bool:
        """Whether a low-rank change may have the role in addition to the pair."""
        return self.stage in {Stage.VIRTUAL, Stage.INPUT, Stage.OUTPUT, Stage.BETWEEN, Stage.AFTER}

    def dtype(self, site: Site) -> torch.dtype:
        """Return the tensor's dtype at a site."""
        return site.dtype if self.of_base else factor_dtype(site.dtype)

    def neutral(self, slot: SlotSpec) -> Tensor:
        """Return the tensor of a slot without an active adapter."""
        return self.start(self, slot)

    def filled(self, slot: SlotSpec, tensor: Tensor | None) -> Tensor:
        """Return a change's tensor in the slot's size, padded with zeros; for None the neutral tensor."""
        if tensor is None:
            return self.neutral(slot)
        axis = 0 if self.padded else self.rank_axis
        if axis is None:
            return self.into_slot(slot.layout, tensor)
        missing = int(slot.size) - tensor.shape[axis]
        if missing > 0:
            shape = [missing if other == axis else size for other, size in enumerate(tensor.shape)]
            tensor = torch.cat([tensor, tensor.new_zeros(shape)], dim=axis)
        return self.into_slot(slot.layout, tensor).contiguous()

    def seen(self, tensor: Tensor) -> Tensor:
        """Return a change's tensor as reports show it."""
        return tensor.mT if self.transposed else tensor


_SHARE = 0.3
"""The noise of a pair relative to its site's output, and the noise of a weight's rows and columns."""


def _per_output(slot: SlotSpec) -> Shape:
    return (slot.site.out_features,)


def _blocks(slot: SlotSpec) -> Shape:
    size = int(slot.size)
    return (slot.site.in_features // size, size, size)


def _weight(slot: SlotSpec) -> Tensor:
    assert slot.weight is not None
    return slot.layout.slot_weight(slot.weight())


def _zeros(role: SlotRole, slot: SlotSpec) -> Tensor:
    return torch.zeros(role.shape(slot), dtype=role.dtype(slot.site))


def _identity(role: SlotRole, slot: SlotSpec) -> Tensor:
    return identity_blocks(slot.site.in_features, int(slot.size), role.dtype(slot.site)).contiguous()


def _spread_of_a(scale: NoiseScale) -> float:
    return float(scale.site.in_features**-0.5)


def _scale_rows_and_columns(weight: Tensor, _: NoiseScale, generator: torch.Generator) -> None:
    """Scale every row and column by positive noise, which is cheaper than noise per value.

    Signs do not change, since a variance must not become negative.
    """
    for axis in (0, weight.dim() - 1):
        shape = [1] * weight.dim()
        shape[axis] = weight.shape[axis]
        weight.mul_(torch.exp(_SHARE * torch.randn(shape, generator=generator)).to(weight.dtype))


def _count_product_flops(site: Site, matrix: Tensor) -> int:
    return 2 * matrix.numel()


_TABLE = (
    SlotRole(
        name=operands.A,
        letter="A",
        meaning="first half of the low-rank pair",
        stage=Stage.DOWN,
        apply=lambda layout, x, a: layout.down(cast_floating(x, a.dtype), a),
        shape=lambda slot: slot.layout.shape_a(slot.size),
        start=_zeros,
        noise=gaussian_noise(_spread_of_a),
        flops=lambda site, a: 0 if site.kind is SiteKind.EMBEDDING else 2 * a.numel(),  # a lookup of rows is free
        into_slot=lambda layout, a: layout.slot_a(a),
        unit="rank {}",
        rank_axis=1,
        reserve="rank",
        transposed=True,
    ),
    SlotRole(
        name=operands.B,
        letter="B",
        meaning="second half of the low-rank pair",
        stage=Stage.UP,
        apply=lambda layout, u, b: layout.up(u, b),
        shape=lambda slot: slot.layout.shape_b(slot.size),
        start=_zeros,
        # The deviation for which the pair's output is ``_SHARE`` of the weight's output.
        noise=gaussian_noise(lambda scale: _SHARE * scale.typical / (_spread_of_a(scale) * scale.rank**0.5)),
        flops=_count_product_flops,
        into_slot=lambda layout, b: layout.slot_b(b),
        unit="rank {}",
        rank_axis=0,
        reserve="rank",
        transposed=True,
    ),
    SlotRole(
        name=operands.C,
        letter="c",
        meaning="scale of the base's outputs",
        stage=Stage.OUTPUT,
        apply=lambda layout, y, c: y * layout.per_output(c).to(y.dtype),
        shape=_per_output,
        reserve="scales",
    ),
    SlotRole(
        name=operands.D,
        letter="d",
        meaning="scale of the base's inputs",
        stage=Stage.INPUT,
        apply=lambda layout, x, d: (x * layout.per_input(d)).to(x.dtype),
        shape=lambda slot: (slot.site.in_features,),
    ),
    SlotRole(
        name=operands.T,
        letter="T",
        meaning="block-diagonal transform of the base's inputs",
        stage=Stage.INPUT,
        apply=lambda layout, x, t: layout.through(x.to(t.dtype), t).to(x.dtype),
        shape=_blocks,
        start=_identity,
        flops=_count_product_flops,
        sized=lambda t: t.shape[-1],
        unit="input transforms in blocks of {}",
    ),
    SlotRole(
        name=operands.G,
        letter="g",
        meaning="scale between the halves of a pair with a shared A",
        stage=Stage.BETWEEN,
        apply=lambda layout, u, g: u * layout.per_rank(g),
        shape=lambda slot: (slot.size,),
        unit="rank {}",
        rank_axis=0,
    ),
    SlotRole(
        name=operands.H,
        letter="h",
        meaning="scale after a pair with a shared B",
        stage=Stage.AFTER,
        apply=lambda layout, u, h: u * layout.per_output(h),
        shape=_per_output,
    ),
    SlotRole(
        name=operands.VIRTUAL,
        letter="v",
        meaning="embeddings of virtual tokens",
        stage=Stage.VIRTUAL,
        apply=lambda layout, x, rows: layout.down((x - layout.site.in_features).clamp(min=0), rows),
        shape=lambda slot: (slot.size, slot.site.out_features),
        start=_zeros,
        flops=lambda *_: 0,
        sized=len,
        unit="{} virtual tokens",
        padded=True,
        reserve="virtual_tokens",
    ),
    SlotRole(
        name=operands.WEIGHT,
        letter="W",
        meaning="merged weight",
        stage=Stage.PRODUCT,
        apply=lambda layout, x, weight: layout.bound(x, weight, None),
        shape=lambda slot: _weight(slot).shape,
        start=lambda _, slot: _weight(slot),
        noise=_scale_rows_and_columns,
        flops=lambda *_: 0,  # the product replaces the base's product
        into_slot=lambda layout, matrix: layout.slot_weight(matrix),
        of_base=True,
        reserve="weights",
        why_shared="a merged weight for each row would be read as often as there are rows",
    ),
    SlotRole(
        name=operands.BIAS,
        letter="b",
        meaning="bias",
        stage=Stage.BIAS,
        apply=lambda layout, y, bias: y + layout.per_output(bias).to(y.dtype),
        shape=_per_output,
        start=lambda role, slot: _zeros(role, slot) if slot.bias is None else slot.bias,
        of_base=True,
        reserve="scales",
    ),
)

ROLES: dict[str, SlotRole] = {role.name: role for role in _TABLE}
"""Name -> role, in the order of lists and bindings and, within a stage, of application."""


def tensors_by_role(change: LowRank) -> dict[str, Tensor]:
    """Return role -> the tensor of a low-rank change, in the table's order; a pair of rank 0 is left out."""
    tensors = {operands.A: change.a, operands.B: change.b} if change.rank else {}
    if not change.scales:
        return tensors
    tensors |= change.scales
    return {name: tensors[name] for name in ROLES if name in tensors}


def roles_needed(change: Change) -> tuple[SlotRole, ...]:
    """Return the roles that a change needs, in the table's order; roles that fold into the pair are left out."""
    low_rank = tensors_by_role(change).keys() - operands.FOLDABLE if isinstance(change, LowRank) else None
    needed = {operands.WEIGHT} if low_rank is None else set(low_rank)
    needed |= set() if change.e is None else {operands.BIAS}
    return tuple(role for role in ROLES.values() if role.name in needed)


def acts_at(change: LowRank, stage: Stage) -> bool:
    """Return whether a change has a scale or transform that acts at a stage."""
    return any(ROLES[name].stage is stage for name in change.scales)


def keeps_base_weight(layout: SiteLayout, change: LowRank) -> bool:
    """Return whether a change can run next to the base's weight: the site is called, and its input can be changed."""
    if layout.site.within is not None:
        return not tensors_by_role(change)
    return layout.has_input_axis or not acts_at(change, Stage.INPUT)


_BRANCH, _STRENGTH = "branch", "t"


def slot_name(path: str, role: str) -> str:
    """Return the public name of a site's slot, which is also its name in the emitted program."""
    return f"{path}:{role}"


def branch_name(index: int) -> str:
    """Return the name of a branch slot from its index in the plan."""
    return f"{_BRANCH}{index}"


def strength_role(branch: str) -> str:
    """Return the role of a branch's strength."""
    return f"{branch}.{_STRENGTH}"


def branch_roles(index: int, count: int) -> list[str]:
    """Return the roles of a branch, by its index in the plan: its strength, then its ``count`` parameters."""
    branch = branch_name(index)
    return [strength_role(branch), *(f"{branch}.{position}" for position in range(count))]


def is_strength(role: str) -> bool:
    """Return whether a role is a branch's strength."""
    return role.startswith(_BRANCH) and role.endswith(f".{_STRENGTH}")


def is_parameter(role: str) -> bool:
    """Return whether a role is one of a branch's parameters."""
    return role not in ROLES and not is_strength(role)


def branch_index(role: str) -> int:
    """Return the plan index of the branch to which a strength or parameter belongs."""
    return int(role.removeprefix(_BRANCH).partition(".")[0])
