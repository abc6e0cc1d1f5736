"""Where boxes lie: layers from top to bottom within each box, lines that go around what they do not read.

Each box and each crossing of a border is in the layer below the last that it depends on. How deep boxes are open
decides how tall they are, and then how wide: a closed box takes the room of its heading. All lengths are pixels;
positions are relative to the box around.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil, floor

from lorac.report.picture.boxes import Box, BoxLink
from lorac.report.picture.coordinates import LayerSlot, place_slots

GAP, PAD = 30.0, 16.0
"""Between layers, and between a box's border and what is inside."""
LANE = 9.0
"""Half of the room that a line takes."""
BEHIND = 5.0
"""How far each of the cards behind a folded box shows."""
NEAR = 0.3
"""How far from the middle of a closed box values cross its border, of how far they do where it is open."""
_Ends = tuple[int | None, int | None]
_Meeting = tuple[LayerSlot, float]


@dataclass(frozen=True)
class HeadingSize:
    """Width and height of a heading: all of a box that is closed, or of which no inside is drawn."""

    width: float
    height: float


@dataclass(frozen=True)
class LayoutEdge:
    """A line in a box: a value, and where it passes.

    Attributes:
        value: the row that computes it.
        source, target: places of the boxes inside it that it joins; None for the border.
        xs: where it leaves, where it passes each layer between, where it arrives.
        layers: the layers of those; -1 for the upper border, one more than the last layer for the lower.
    """

    value: int
    source: int | None
    target: int | None
    xs: tuple[float, ...]
    layers: tuple[int, ...]


@dataclass(eq=False)
class BoxLayout:
    """A box with its place.

    Attributes:
        part: what it is.
        heading: its size where it is closed.
        inner: the boxes inside, as ``part.parts``.
        layers: their places in ``inner``, layer by layer, from left to right.
        opened: whether what is inside is shown.
        tops: where each layer begins, and where one after the last would: as tall is the box where it is open.
        full: its width where it is open.
        x, y: its upper left corner, in the box around it.
        wires: the lines inside.
        doors: (value, whether it enters) -> where it crosses the border of the open box, from its left.
    """

    part: Box
    heading: HeadingSize
    inner: tuple[BoxLayout, ...] = ()
    layers: tuple[tuple[int, ...], ...] = ()
    opened: bool = False
    tops: tuple[float, ...] = ()
    full: float = 0.0
    x: float = 0.0
    y: float = 0.0
    wires: tuple[LayoutEdge, ...] = ()
    doors: dict[tuple[int, bool], float] = field(default_factory=dict)

    @property
    def behind(self) -> float:
        """Room for the cards behind it, to the right and below."""
        return 2 * BEHIND if self.part.copies else 0.0

    @property
    def width(self) -> float:
        """Its width, without the cards behind."""
        return self.full if self.opened else self.heading.width

    @property
    def height(self) -> float:
        """Its height, without the cards behind."""
        return self.tops[-1] if self.opened else self.heading.height

    def door(self, value: int, *, into: bool) -> float:
        """Where a value crosses its upper or lower border, from its left."""
        place = self.doors.get((value, into))
        if place is None or not self.opened:
            return self.width / 2 + (0.0 if place is None else NEAR * self.width * (place / self.full - 0.5))
        return place

    def tall(self, layer: Sequence[int]) -> float:
        """The height of a layer."""
        return max((self.inner[n].height + self.inner[n].behind for n in layer), default=0.0)


def lay_out(part: Box, size: Callable[[Box], HeadingSize], tallest: float) -> BoxLayout:
    """The places of a box and of all inside; as many levels are open as are no taller together than they may be.

    Args:
        part: the box; it is open in any case.
        size: how large headings are.
        tallest: how tall it may become.
    """
    root = _assign_layers(part, size)
    for depth in range(_depth(root), 0, -1):
        _open_to(root, depth)
        if root.height <= tallest:
            break
    _place_horizontally(root)
    return root


def _assign_layers(part: Box, size: Callable[[Box], HeadingSize]) -> BoxLayout:
    """A box in which it is known what lies in which layer."""
    inner = tuple(_assign_layers(child, size) for child in part.parts)
    found = _find_layers(part)
    layers = [tuple(n for n, layer in enumerate(found) if layer == here) for here in range(max(found, default=-1) + 1)]
    return BoxLayout(part, size(part), inner, tuple(layers))


def _edge_ends(part: Box) -> list[_Ends]:
    """The boxes that each link joins, by their places."""
    number: dict[Box | None, int | None] = {child: n for n, child in enumerate(part.parts)}
    return [(number.get(link.source), number.get(link.target)) for link in part.links]


def _find_layers(part: Box) -> list[int]:
    """The layer of each box inside: below all it reads; what reads nothing inside lies above its first reader."""
    import networkx as nx

    ends = _edge_ends(part)
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(part.parts)))
    graph.add_edges_from((source, target) for source, target in ends if source is not None and target is not None)
    layer: dict[int, int] = {}
    for n in nx.topological_sort(graph):
        layer[n] = 1 + max((layer[before] for before in graph.predecessors(n)), default=-1)
    fed = {target for source, target in ends if source is None}
    for n in graph:
        after = [layer[reader] for reader in graph.successors(n)]
        if after and not graph.in_degree(n) and n not in fed:
            layer[n] = min(after) - 1
    return [layer[n] for n in range(len(part.parts))]


def _depth(box: BoxLayout) -> int:
    """How many boxes lie in one another at most."""
    return max((1 + _depth(child) for child in box.inner), default=0)


def _open_to(box: BoxLayout, depth: int) -> None:
    """Open a box and those inside down to a depth, close all deeper ones, and put each below those it depends on."""
    box.opened = bool(box.inner) and depth > 0
    for child in box.inner:
        _open_to(child, depth - 1)
    steps = [box.heading.height + GAP, *(box.tall(layer) + GAP for layer in box.layers)]
    box.tops = tuple(itertools.accumulate(steps))
    for layer, top in zip(box.layers, box.tops, strict=False):
        for child in (box.inner[n] for n in layer):
            child.y = top + (box.tall(layer) - child.height - child.behind) / 2


def _place_horizontally(box: BoxLayout) -> None:
    """Give all inside a box its place from left to right, and the box the width for it."""
    for child in box.inner:
        _place_horizontally(child)
    if box.inner:
        _LayeredLayout(box).spread()


class _LayeredLayout:
    """Lays out one box from left to right, the boxes inside being laid out."""

    def __init__(self, box: BoxLayout) -> None:
        self.box, self.inner = box, box.inner
        self.layer = {n: layer for layer, numbers in enumerate(box.layers) for n in numbers}
        self.count = len(box.layers)
        self.spots = [LayerSlot(self.layer[n], child.width + child.behind, n) for n, child in enumerate(box.inner)]
        self.passing: dict[tuple[int | None, int, int], LayerSlot] = {}
        self.ends = list(zip(box.part.links, _edge_ends(box.part), strict=True))
        self.routes = [self._route(link, *ends) for link, ends in self.ends]
        self._join()

    def spread(self) -> None:
        """Put everything at its place."""
        box = self.box
        rows: list[list[LayerSlot]] = [[] for _ in range(self.count + 2)]
        for spot in [*self.spots, *self.passing.values()]:
            rows[spot.layer + 1].append(spot)
        place_slots(rows)
        spots = [spot for row in rows for spot in row]
        for spot in spots:
            spot.x = round(spot.x)
        left = floor(min(spot.x - spot.width / 2 for spot in spots) - PAD)
        width = ceil(max(spot.x + spot.width / 2 for spot in spots) + PAD) - left
        box.full = max(width, box.heading.width)
        left -= round((box.full - width) / 2)
        box.layers = tuple(tuple(spot.box for spot in row if spot.box is not None) for row in rows[1:-1])
        for spot, child in zip(self.spots, self.inner, strict=True):
            child.x = spot.x - spot.width / 2 - left
        for (_, value, layer), spot in self.passing.items():
            if layer in (-1, self.count):
                box.doors[value, layer == -1] = spot.x - left
        box.wires = tuple(self._wire(*end, route, left) for end, route in zip(self.ends, self.routes, strict=True))

    def _route(self, link: BoxLink, source: int | None, target: int | None) -> list[LayerSlot]:
        """The spots from one end of a link to the other; links of one value share those on the way."""
        begin = -1 if source is None else self.layer[source]
        end = self.count if target is None else self.layer[target]
        first = self._passing(source, link.value, -1) if source is None else self.spots[source]
        last = self._passing(source, link.value, end) if target is None else self.spots[target]
        return [first, *(self._passing(source, link.value, n) for n in range(begin + 1, end)), last]

    def _passing(self, source: int | None, value: int, layer: int) -> LayerSlot:
        return self.passing.setdefault((source, value, layer), LayerSlot(layer, 2 * LANE))

    def _join(self) -> None:
        """Tell every spot what it is joined to, once for lines that share the way."""
        joined = dict.fromkeys(itertools.chain.from_iterable(map(self._steps, self.ends, self.routes)))
        for (one, here), (other, there) in joined:
            one.joined.append((other, here, there))
            other.joined.append((one, there, here))

    def _steps(self, end: tuple[BoxLink, _Ends], route: Sequence[LayerSlot]) -> Iterator[tuple[_Meeting, _Meeting]]:
        """The pairs of spots that a line joins, each with where it meets them."""
        link, (source, target) = end
        shifts = [0.0] * len(route)
        shifts[0] = self._shift(source, link.value, into=False)
        shifts[-1] = self._shift(target, link.value, into=True)
        return itertools.pairwise(zip(route, shifts, strict=True))

    def _shift(self, number: int | None, value: int, *, into: bool) -> float:
        """Where a line meets a box, from the middle of its spot, which has room for the cards behind it."""
        if number is None:
            return 0.0
        child = self.inner[number]
        return child.door(value, into=into) - (child.width + child.behind) / 2

    def _wire(self, link: BoxLink, ends: _Ends, route: Sequence[LayerSlot], left: float) -> LayoutEdge:
        xs = [spot.x - left for spot in route]
        for place, number in zip((0, -1), ends, strict=True):
            if number is not None:
                child = self.inner[number]
                xs[place] = child.x + child.door(link.value, into=bool(place))
        return LayoutEdge(link.value, *ends, tuple(xs), tuple(spot.layer for spot in route))
