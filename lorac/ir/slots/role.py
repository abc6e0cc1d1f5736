"""What a row of the table of roles says (``lorac.ir.slots.roles``): everything there is to know of one kind of slot."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lorac.ir.sites import Site, factor_dtype
from lorac.ir.slots.layouts import SiteLayout

Tensor = torch.Tensor
Size = int | torch.SymInt
Shape = tuple[Size, ...]


class Stage(enum.Enum):
    """Where in a site's computation a role acts. Roles of one stage act in the order of the table."""

    INPUT = "on what the base's product reads"
    PRODUCT = "in the place of the base's product"
    OUTPUT = "on what the base's product gives"
    DOWN = "as the first half of the pair"
    BETWEEN = "between the halves of the pair"
    UP = "as the second half of the pair"
    BEHIND = "behind the pair"
    BIAS = "in the place of the base's bias"

    @property
    def of_pair(self) -> bool:
        """Whether it is part of what runs beside the base's product, which that does not notice."""
        return self in {Stage.DOWN, Stage.BETWEEN, Stage.UP, Stage.BEHIND}


@dataclass(frozen=True, eq=False, kw_only=True)
class SlotSpec:
    """Where a slot stands: what its shape and its neutral value follow from.

    Attributes:
        layout: what the site computes, and how its slots are laid out.
        size: for roles along the rank the rank at hand, symbolic in a graph; for others the plan's room.
        weight: reads W (out, in), for the role that holds it; where only shapes are asked for, one without values.
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
    """What noise in a slot is measured by.

    Attributes:
        site: the site.
        typical: a typical size of its weight's values.
        rank: how wide the noise's pair is.
    """

    site: Site
    typical: float
    rank: int


JoinTensors = Callable[[Sequence[Tensor | None], Sequence[int]], Tensor]
"""How the tensors of several sites lie in the slot of their pack."""
AddNoise = Callable[[Tensor, NoiseScale, torch.Generator], None]
"""Moves a slot's neutral tensor away from neutral, in place."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SlotRole:
    """One kind of slot.

    Attributes:
        name: its name in slots, files and changes.
        letter: how people see it.
        meaning: what it is, in a few words.
        stage: where it acts.
        apply: (layout, value, tensor) -> the value behind it. Linear in the tensor: applying the tensor's difference
            from neutral gives the difference that it makes.
        shape: its shape at a place.
        start: (this role, place) -> its tensor where nothing is active.
        noise: what the self-test puts into it.
        flops: (site, part of a change) -> multiplications and additions per token that it costs.
        into_slot: a change's part in slot layout.
        sized: the size of a change's part where that is no rank: that of its blocks; 1 where there is nothing to size.
        unit: how its room is said, ``{}`` for the number; empty where there is nothing to size.
        rank_axis: the axis of a change's part that counts components; None where none does. Room for such a part is the
            largest rank of the site's pair, and the rank may differ from call to call.
        of_base: it has the base's dtype; others have that of factors (PEFT's rule).
        reserve: the field of ``Reserve`` that makes room for it; empty where none does, so that only a bound weight
            admits what needs it.
        transposed: adapters store the transpose of what changes carry, and people see it so.
        packed: (what several linear sites that read one input have in this slot, or None, how many outputs each has) ->
            what the slot of their pack holds, whose outputs are theirs one after the other. None where a site with such
            a slot is not packed.
        alone: why it is not.
    """

    name: str
    letter: str
    meaning: str
    stage: Stage
    apply: Callable[[SiteLayout, Tensor, Tensor], Tensor]
    shape: Callable[[SlotSpec], Shape]
    start: Callable[[SlotRole, SlotSpec], Tensor]
    noise: AddNoise
    flops: Callable[[Site, Tensor], int] = lambda _, part: part.numel()
    into_slot: Callable[[SiteLayout, Tensor], Tensor] = lambda _, part: part
    sized: Callable[[Tensor], int] = lambda _: 1
    unit: str = ""
    rank_axis: int | None = None
    of_base: bool = False
    reserve: str = ""
    transposed: bool = False
    packed: JoinTensors | None = None
    alone: str = ""

    @property
    def ranked(self) -> bool:
        """Whether it lies along the rank of the site's pair."""
        return self.rank_axis is not None

    def room(self, part: Tensor) -> int:
        """The room that a change's part asks for."""
        return self.sized(part) if self.rank_axis is None else part.shape[self.rank_axis]

    @property
    def merged(self) -> bool:
        """Whether it takes the place of something of the base's, and holds it whole."""
        return self.stage in {Stage.PRODUCT, Stage.BIAS}

    @property
    def optional(self) -> bool:
        """Whether a low-rank change may carry it besides its pair."""
        return self.stage in {Stage.INPUT, Stage.OUTPUT, Stage.BETWEEN, Stage.BEHIND}

    def dtype(self, site: Site) -> torch.dtype:
        """Its dtype at a site."""
        return site.dtype if self.of_base else factor_dtype(site.dtype)

    def neutral(self, place: SlotSpec) -> Tensor:
        """What it holds where nothing is active."""
        return self.start(self, place)

    def filled(self, place: SlotSpec, part: Tensor | None) -> Tensor:
        """What it holds for a change's part, or for none; along the rank filled up with zeros to the place's size."""
        if part is None:
            return self.neutral(place)
        if self.rank_axis is None:
            return self.into_slot(place.layout, part)
        missing = int(place.size) - part.shape[self.rank_axis]
        if missing > 0:
            shape = [missing if axis == self.rank_axis else size for axis, size in enumerate(part.shape)]
            part = torch.cat([part, part.new_zeros(shape)], dim=self.rank_axis)
        return self.into_slot(place.layout, part).contiguous()

    def seen(self, part: Tensor) -> Tensor:
        """A change's part as people see it."""
        return part.mT if self.transposed else part
