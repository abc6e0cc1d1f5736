"""The table of slot roles, with one row per kind of tensor that can be replaced at a site.

An adapted site computes, of its input x and with the base's weight W and bias b,

    ``y' = c∘(W·((d∘x)·T)) + h∘(((x·A)∘g)·B) + bias``

and every letter of it is a role. A row (``lorac.ir.slots.role``) says where the role acts and by which function, its
neutral value, its shape, what makes room for it, its cost and its symbol. Everything else is derived: plans have room
for roles, changes fill them, ``run_site`` applies them stage by stage, graphs get an input for each, files store them,
reports name them and the self-test fills them with noise. A new role is a new row, and a reduction that makes changes
with it; nothing else lists roles.

The names of roles are ``lorac.ir.algebra.operands``, since the algebra merges and adds changes by operand. Tensors are
in slot layout (``lorac.ir.slots.layouts``) unless stated otherwise. The functions at the end name slots of branches.
"""

import torch
from torch import Tensor

from lorac.ir.algebra import operands
from lorac.ir.algebra.changes import Change, LowRank, identity_blocks
from lorac.ir.sites.site import Site, SiteKind, cast_floating
from lorac.ir.slots.layouts import SiteLayout
from lorac.ir.slots.role import NoiseScale, Shape, SlotRole, SlotSpec, Stage, gaussian_noise

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


def _spread_of_b(scale: NoiseScale) -> float:
    """Return the deviation for which the pair's output is a share of the weight's."""
    return float(_SHARE * scale.typical / (_spread_of_a(scale) * scale.rank**0.5))


def _scale_rows_and_columns(weight: Tensor, _: NoiseScale, generator: torch.Generator) -> None:
    """Scale every row and column by positive noise, which is cheaper than noise per value.

    Signs stay, since a variance must not become negative.
    """
    for axis in (0, weight.dim() - 1):
        shape = [1] * weight.dim()
        shape[axis] = weight.shape[axis]
        weight.mul_(torch.exp(_SHARE * torch.randn(shape, generator=generator)).to(weight.dtype))


def _count_down_flops(site: Site, a: Tensor) -> int:
    """Count the operations of x·A; looking rows up costs nothing."""
    return 0 if site.kind is SiteKind.EMBEDDING else 2 * a.numel()


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
        flops=_count_down_flops,
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
        noise=gaussian_noise(_spread_of_b),
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
        name=operands.WEIGHT,
        letter="W",
        meaning="merged weight",
        stage=Stage.PRODUCT,
        apply=lambda layout, x, weight: layout.bound(x, weight, None),
        shape=lambda slot: _weight(slot).shape,
        start=lambda _, slot: _weight(slot),
        noise=_scale_rows_and_columns,
        flops=lambda *_: 0,  # its product replaces the base's
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
"""Name -> role, in the order of lists, of bindings and, within a stage, of application."""


def tensors_by_role(change: LowRank) -> dict[str, Tensor]:
    """Return role -> the tensor of a low-rank change, in the table's order, without a pair of rank 0."""
    pair = {operands.A: change.a, operands.B: change.b} if change.rank else {}
    tensors = {**pair, **change.scales}
    return {name: tensors[name] for name in ROLES if name in tensors}


def roles_needed(change: Change) -> tuple[SlotRole, ...]:
    """Return the roles that a change needs, in the table's order, without those that fold into its pair."""
    low_rank = tensors_by_role(change).keys() - operands.FOLDABLE if isinstance(change, LowRank) else None
    needed = {operands.WEIGHT} if low_rank is None else set(low_rank)
    needed |= set() if change.e is None else {operands.BIAS}
    return tuple(role for role in ROLES.values() if role.name in needed)


def acts_at(change: LowRank, stage: Stage) -> bool:
    """Return whether a change has a scale or transform that acts at a stage."""
    return any(ROLES[name].stage is stage for name in change.scales)


def keeps_base_weight(layout: SiteLayout, change: LowRank) -> bool:
    """Return whether a change runs next to the base's weight: the site is called, and its input can be changed."""
    if layout.site.within is not None:
        return not tensors_by_role(change)
    return layout.has_input_axis or not acts_at(change, Stage.INPUT)


_BRANCH, _STRENGTH = "branch", "t"


def slot_name(path: str, role: str) -> str:
    """Return the public name of a site's slot, which the emitted program keeps."""
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
    """Return the index in the plan of the branch that a strength or parameter belongs to."""
    return int(role.removeprefix(_BRANCH).partition(".")[0])
