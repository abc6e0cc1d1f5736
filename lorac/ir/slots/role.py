"""A row of the table of roles (``lorac.ir.slots.roles``): everything about one kind of slot."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lorac.ir.sites.site import Site, factor_dtype
from lorac.ir.slots.layouts import SiteLayout

Size = int | torch.SymInt
Shape = tuple[Size, ...]


class Stage(enum.Enum):
    """The steps of a site's computation in which roles act. Roles of one stage act in the table's order."""

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
        """Whether it belongs to the low-rank pair, which runs next to the base's product and leaves it as it is."""
        return self in {Stage.DOWN, Stage.BETWEEN, Stage.UP, Stage.AFTER}


@dataclass(frozen=True, eq=False, kw_only=True)
class SlotSpec:
    """A slot of a role, as far as its shape and neutral value depend on it.

    Attributes:
        size: the rank for roles along the rank, symbolic in a graph; the plan's room for other roles.
        weight: reads W (out, in), for the role that holds it; a tensor without values is enough for shapes.
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
    """Inputs to the size of the noise in a slot.

    Attributes:
        typical: a typical size of its weight's values.
        rank: the rank of the noise's pair.
    """

    site: Site
    typical: float
    rank: int


AddNoise = Callable[[Tensor, NoiseScale, torch.Generator], None]
"""Changes a slot's neutral tensor by noise, in place."""


def fill_ones(role: SlotRole, slot: SlotSpec) -> Tensor:
    """Return the neutral tensor of a scale."""
    return torch.ones(role.shape(slot), dtype=role.dtype(slot.site))


def gaussian_noise(deviation: Callable[[NoiseScale], float]) -> AddNoise:
    """Return a function that adds Gaussian noise of a deviation to a slot's tensor."""

    def add_noise(tensor: Tensor, scale: NoiseScale, generator: torch.Generator) -> None:
        tensor.add_(deviation(scale) * torch.randn(tensor.shape, generator=generator).to(tensor.dtype))

    return add_noise


_SMALL_NOISE = gaussian_noise(lambda _: 0.1)


@dataclass(frozen=True, eq=False, kw_only=True)
class SlotRole:
    """One kind of slot.

    Attributes:
        name: its name in slots, files and changes.
        letter: its symbol in reports.
        meaning: a short description.
        stage: the step in which it acts.
        apply: (layout, value, tensor) -> the value after it. It is linear in the tensor: applied to the tensor's
            difference from neutral it gives the difference that the tensor makes.
        start: (this role, slot) -> its neutral tensor, for a slot without an active adapter; default: ones.
        noise: changes it in the self-test; default: Gaussian noise of deviation 0.1.
        flops: (site, a change's tensor) -> its multiplications and additions per token.
        into_slot: converts a change's tensor to slot layout.
        sized: the size of a change's tensor along something other than the rank, such as that of blocks; else 1.
        unit: a phrase for its room, with ``{}`` for the number; empty without a size.
        rank_axis: the axis of a change's tensor that counts components, or None. Room for such a tensor is the largest
            rank of the site's pair, and the rank may differ between calls.
        of_base: it has the base's dtype; others have that of the factors (PEFT's rule).
        reserve: the field of ``Reserve`` that makes room for it; empty if only a bound weight can hold such a change.
        why_shared: why all rows of a batch share such a slot; empty where each may have its own.
        transposed: adapters store the transpose of a change's tensor, and reports show it.
    """

    name: str
    letter: str
    meaning: str
    stage: Stage
    apply: Callable[[SiteLayout, Tensor, Tensor], Tensor]
    shape: Callable[[SlotSpec], Shape]
    start: Callable[[SlotRole, SlotSpec], Tensor] = fill_ones
    noise: AddNoise = _SMALL_NOISE
    flops: Callable[[Site, Tensor], int] = lambda _, part: part.numel()
    into_slot: Callable[[SiteLayout, Tensor], Tensor] = lambda _, part: part
    sized: Callable[[Tensor], int] = lambda _: 1
    unit: str = ""
    rank_axis: int | None = None
    of_base: bool = False
    reserve: str = ""
    why_shared: str = ""
    transposed: bool = False

    @property
    def ranked(self) -> bool:
        """Whether it has an axis of the rank of the site's pair."""
        return self.rank_axis is not None

    def room(self, tensor: Tensor) -> int:
        """Return the room that a change's tensor needs."""
        return self.sized(tensor) if self.rank_axis is None else tensor.shape[self.rank_axis]

    @property
    def merged(self) -> bool:
        """Whether it replaces the base's weight or bias whole."""
        return self.stage in {Stage.PRODUCT, Stage.BIAS}

    @property
    def optional(self) -> bool:
        """Whether a low-rank change may have it in addition to its pair."""
        return self.stage in {Stage.INPUT, Stage.OUTPUT, Stage.BETWEEN, Stage.AFTER}

    def dtype(self, site: Site) -> torch.dtype:
        """Return its dtype at a site."""
        return site.dtype if self.of_base else factor_dtype(site.dtype)

    def neutral(self, slot: SlotSpec) -> Tensor:
        """Return its tensor for a slot without an active adapter."""
        return self.start(self, slot)

    def filled(self, slot: SlotSpec, tensor: Tensor | None) -> Tensor:
        """Return a slot's tensor for a change's tensor or None; along the rank it is padded with zeros to the size."""
        if tensor is None:
            return self.neutral(slot)
        if self.rank_axis is None:
            return self.into_slot(slot.layout, tensor)
        missing = int(slot.size) - tensor.shape[self.rank_axis]
        if missing > 0:
            shape = [missing if axis == self.rank_axis else size for axis, size in enumerate(tensor.shape)]
            tensor = torch.cat([tensor, tensor.new_zeros(shape)], dim=self.rank_axis)
        return self.into_slot(slot.layout, tensor).contiguous()

    def seen(self, tensor: Tensor) -> Tensor:
        """Return a change's tensor as reports show it."""
        return tensor.mT if self.transposed else tensor
