"""Side by side: where boxes and lines lie within their layers.

Each box, each line that passes a layer, and each crossing of a border has a spot. The spots of a layer are ordered by
the middle of what they are joined to, and moved as near to it as their neighbours let them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

SLOT_GAP = 22.0
"""Between neighbours of which one is a box, in pixels."""
_PULLS = {0: 6.0, 1: 0.15, 2: 1.0}
"""How strongly two spots of which so many are boxes are drawn together: lines are straight, and bend for boxes."""
_SWEEPS = 18
_UNATTACHED_WEIGHT = 0.01
"""How strongly what is joined to nothing stays where it is."""


@dataclass(eq=False)
class LayerSlot:
    """A place in a layer: a box, a line that passes, or a crossing of the border.

    Attributes:
        layer: which layer.
        width: the room it takes.
        box: the number of the box; None for others.
        x: its middle.
        joined: (another spot, where on this one, where on the other), the last two from the middle.
    """

    layer: int
    width: float
    box: int | None = None
    x: float = 0.0
    joined: list[tuple[LayerSlot, float, float]] = field(default_factory=list)

    def wish(self, *towards: int) -> tuple[float, float]:
        """Where it wants to lie for what it is joined to in layers above (-1) or below (1), and how strongly."""
        weight = total = 0.0
        for other, here, there in self.joined:
            if (1 if other.layer > self.layer else -1) in towards:
                pull = _PULLS[(self.box is not None) + (other.box is not None)]
                weight, total = weight + pull, total + pull * (other.x + there - here)
        return (total / weight, weight) if weight else (self.x, _UNATTACHED_WEIGHT)


def place_slots(layers: Sequence[list[LayerSlot]]) -> None:
    """Give the spots of each layer their order and their places."""
    _order_layers(layers)
    _straighten_layers(layers)


def _order_layers(rows: Sequence[list[LayerSlot]]) -> None:
    """Sort each layer by the middle of what its spots are joined to, downwards and upwards in turn."""
    for row in rows:
        _pack_layer(row)
    for sweep in range(_SWEEPS):
        towards = 1 if sweep % 2 else -1
        for row in rows if towards < 0 else rows[::-1]:
            row.sort(key=lambda spot: spot.wish(towards)[0])
            _pack_layer(row)


def _pack_layer(row: Sequence[LayerSlot]) -> None:
    """Put spots side by side around the middle."""
    x = -sum(_min_distance(one, other) for one, other in itertools.pairwise(row)) / 2
    for n, spot in enumerate(row):
        x += _min_distance(row[n - 1], spot) if n else 0.0
        spot.x = x


def _straighten_layers(rows: Sequence[list[LayerSlot]]) -> None:
    """Move spots, in their order, towards the middle of what they are joined to."""
    for sweep in range(_SWEEPS):
        towards = ((-1,), (1,), (-1, 1))[sweep % 3]
        for row in rows[::-1] if towards == (1,) else rows:
            _set_positions(row, _fit_positions(row, [spot.wish(*towards) for spot in row]))


def _set_positions(row: Sequence[LayerSlot], xs: Sequence[float]) -> None:
    for spot, x in zip(row, xs, strict=True):
        spot.x = x


def _min_distance(one: LayerSlot, other: LayerSlot) -> float:
    """How far apart the middles of two neighbours are at least."""
    between = SLOT_GAP if one.box is not None or other.box is not None else 0.0
    return (one.width + other.width) / 2 + between


def _fit_positions(row: Sequence[LayerSlot], wishes: Sequence[tuple[float, float]]) -> list[float]:
    """The places nearest to the wishes that leave neighbours their room: a weighted isotonic regression.

    x_n - x_(n-1) >= room_n becomes y_n >= y_(n-1) for y_n = x_n - room_1 - ... - room_n; neighbours that would pass
    each other are pooled at their weighted mean.
    """
    offsets = list(itertools.accumulate((_min_distance(a, b) for a, b in itertools.pairwise(row)), initial=0.0))
    pools: list[tuple[float, float, int]] = []
    for (wish, pull), offset in zip(wishes, offsets, strict=False):
        mean, weight, count = wish - offset, pull, 1
        while pools and pools[-1][0] > mean:
            other, heavy, many = pools.pop()
            mean = (mean * weight + other * heavy) / (weight + heavy)
            weight, count = weight + heavy, count + many
        pools.append((mean, weight, count))
    ys = [mean for mean, _, count in pools for _ in range(count)]
    return [y + offset for y, offset in zip(ys, offsets, strict=False)]
