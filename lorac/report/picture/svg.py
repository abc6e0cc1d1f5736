"""The picture as SVG: boxes, their headings, a mark per adapter, lines with the shapes that flow along them.

Text is set in a fixed-width font, so that its room is known. Boxes are groups within groups, each moved to its place in
the one around it: the page's script opens and closes them by moving what lies below, and draws the lines anew.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

from lorac.report.picture.boxes import Box
from lorac.report.picture.layout import BEHIND, BoxLayout, HeadingSize, LayoutEdge
from lorac.report.terms import LEFT_OUT

CHARACTER = 7.25
"""Width of a character of the picture's text, rounded up."""
HEAD, MARK = 26.0, 19.0
"""Height of a heading's line, and of a mark below it."""
_MAX_LABEL, _MAX_MARKS = 34, 6
"""Characters of a name that are shown, and marks on one box."""
_MIN_WIDTH = 72.0
_CENTERED_KINDS = ("ops", "in", "out")
_CORNER_RADIUS = {"site": 6, "module": 6, "ops": 13, "in": 13, "out": 13, "graph": 8}


@dataclass(frozen=True)
class AdapterMark:
    """One adapter at one site, as a box shows it.

    Attributes:
        adapter: its name.
        form: its normal form, with rank or count.
        state: how it runs.
        strength: in the active choice; 0: off.
        colour: the number of its colour.
    """

    adapter: str
    form: str
    state: str
    strength: float
    colour: int

    @property
    def how(self) -> str:
        """How it runs, and how strongly where that is not all there is to say."""
        if self.state == LEFT_OUT or self.strength == 1:
            return self.state
        return f"{self.state} x {self.strength:g}" if self.strength else f"{self.state}, off"


class SvgWriter:
    """Draws one graph.

    Args:
        name: the graph's number, with which the ids of its boxes begin.
        marks: site path -> what is marked there.
        types: row -> dtype and shape of its value.
        reserved: sites that have slots and no adapter.
    """

    def __init__(
        self,
        name: str,
        marks: Mapping[str, Sequence[AdapterMark]],
        types: Sequence[str],
        reserved: Collection[str] = (),
    ) -> None:
        self.name, self.marks, self.types, self.reserved = name, marks, types, reserved
        self.numbers: dict[Box, int] = {}

    def number(self, root: Box) -> dict[Box, int]:
        """Box -> its number, from top to bottom."""
        self.numbers = {part: n for n, part in enumerate(root.all())}
        return self.numbers

    def size(self, part: Box) -> HeadingSize:
        """How large a box or its heading is."""
        if part.kind == "graph":
            return HeadingSize(0.0, 0.0)
        heading = len(_truncate(part.title)) + len(_truncate(part.about)) + 3 + 6 * bool(part.copies)
        if part.parts:
            colours, count = self._within(part)
            heading += 4 + len(count) + 2 * len(colours)
        marks = self._marks(part)
        widest = max([heading, *(len(_truncate(m.adapter)) + len(m.form) + len(m.how) + 6 for m in marks)])
        rows = min(len(marks), _MAX_MARKS) + (len(marks) > _MAX_MARKS)
        return HeadingSize(
            max(_MIN_WIDTH, 2 * ceil(widest * CHARACTER / 2) + 14), HEAD + (MARK * rows + 5 if rows else 0)
        )

    def svg(self, root: BoxLayout) -> str:
        """The whole picture."""
        width, height = root.width + 2, root.height + 2
        return (
            f'<svg class="graph" viewBox="-1 -1 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
            f' role="group" aria-label="{_escape_html(f"graph {root.part.title}")}">{"".join(self._box(root))}</svg>'
        )

    # --- boxes -------------------------------------------------------------------------------------------------

    def _box(self, box: BoxLayout) -> Iterator[str]:
        part, marks = box.part, self._marks(box.part)
        free = any(site in self.reserved for site in part.sites)
        adapted = "adapted" if marks else "reserved" if free else "bare" if part.kind == "site" else ""
        state = ("open" if box.opened else "closed") if part.parts else ""
        classes = " ".join(word for word in ("box", part.kind, adapted, state) if word)
        yield (
            f'<g id="{self._id(part)}" class="{classes}" transform="translate({_format_point(box.x, box.y)})"'
            f' tabindex="0" role="button" aria-label="{_escape_html(_aria_label(part, marks))}">'
        )
        yield from self._frame(box, len(marks))
        for n, mark in enumerate(marks[:_MAX_MARKS]):
            yield from _mark_elements(mark, box.width, HEAD + n * MARK)
        if len(marks) > _MAX_MARKS:
            y = HEAD + _MAX_MARKS * MARK + 13
            yield f'<text class="more" x="12" y="{y:g}">… and {len(marks) - _MAX_MARKS} more</text>'
        if part.parts:
            yield f'<g class="inside{"" if box.opened else " hidden"}">'
            yield from (f'<path class="wire" d="{wire_path(wire, box)[0]}"/>' for wire in box.wires)
            yield from (self._shape(n, wire, box) for n, wire in enumerate(box.wires))
            yield from itertools.chain.from_iterable(self._box(child) for child in box.inner)
            yield "</g>"
        yield "</g>"

    def _frame(self, box: BoxLayout, marks: int) -> Iterator[str]:
        part, rounded = box.part, _CORNER_RADIUS[box.part.kind]
        for n in (2, 1) if part.copies else ():
            yield _rectangle("card", n * BEHIND, n * BEHIND, box.width, box.height, rounded)
        yield _rectangle("frame", 0, 0, box.width, box.height, rounded)
        x = 10
        if part.parts:
            yield f'<text class="toggle" x="8" y="17">{"▾" if box.opened else "▸"}</text>'
            x = 24
        title, about = _truncate(part.title), _truncate(part.about)
        if part.kind in _CENTERED_KINDS:
            name = (
                f"<tspan class='title'>{_escape_html(title)}</tspan> <tspan class='about'>{_escape_html(about)}</tspan>"
            )
            yield f'<text class="centred" x="{box.width / 2:.0f}" y="17">{name}</text>'
            return
        yield f'<text class="title" x="{x}" y="17">{_escape_html(title)}</text>'
        if about:
            yield f'<text class="about" x="{x + (len(title) + 1) * CHARACTER:.0f}" y="17">{_escape_html(about)}</text>'
        yield from self._totals(box) if part.parts else ()
        if part.copies:
            count = len(part.copies) + 1
            yield f'<text class="count" x="{box.width - 8:.0f}" y="17">× {count}</text>'

    def _totals(self, box: BoxLayout) -> Iterator[str]:
        """What a closed box shows of what is inside, at its right end when closed."""
        colours, count = self._within(box.part)
        x = box.heading.width - 10 - 6 * CHARACTER * bool(box.part.copies) - len(count) * CHARACTER
        yield '<g class="totals">'
        for n, colour in enumerate(reversed(colours)):
            yield f'<rect class="bar c{colour}" x="{x - 14 - 13 * n:.0f}" y="8" width="10" height="10" rx="3"/>'
        yield f'<text x="{x:.0f}" y="17">{count}</text></g>'

    def _within(self, part: Box) -> tuple[list[int], str]:
        """The colours of the adapters inside a box, and at how many of its sites they are."""
        inside = [inner for inner in part.all() if inner is not part]
        sites = [site for inner in inside for site in inner.sites]
        colours = sorted({mark.colour for site in sites for mark in self.marks.get(site, ())})
        adapted = sum(site in self.marks for site in sites)
        return colours, f"{adapted} of {len(sites)}" if adapted else ""

    def _marks(self, part: Box) -> list[AdapterMark]:
        """The marks of a box; where it has several sites, with which one it is, as far as its own path does not say."""
        if len(part.sites) == 1:
            return list(self.marks.get(part.sites[0], ()))
        at = {site: site.removeprefix(part.call).removeprefix(".") for site in part.sites}
        marks = ((mark, at[site]) for site in part.sites for mark in self.marks.get(site, ()))
        return [replace(mark, form=f"{mark.form} at {leaf}") if leaf else mark for mark, leaf in marks]

    def _id(self, part: Box) -> str:
        return f"g{self.name}b{self.numbers[part]}"

    # --- lines -------------------------------------------------------------------------------------------------

    def _shape(self, number: int, wire: LayoutEdge, box: BoxLayout) -> str:
        """The shape that flows along a line, once for the lines that leave a box with the same value."""
        first = next(n for n, w in enumerate(box.wires) if (w.source, w.value) == (wire.source, wire.value))
        shape = self.types[wire.value]
        if wire.source is None or number != first or not shape:
            return ""
        x, y = wire.xs[0] + 5, wire_path(wire, box)[1] + 12
        return (
            f'<text class="shape" data-wire="{number}" x="{x:.1f}" y="{y:.1f}">{_escape_html(_truncate(shape))}</text>'
        )


def wire_path(wire: LayoutEdge, box: BoxLayout) -> tuple[str, float]:
    """The path of a line, and where it begins: straight down past each layer, bent between them."""
    spans = [_span(wire, place, box) for place in range(len(wire.xs))]
    path = [f"M{_format_point(wire.xs[0], spans[0][0])}V{spans[0][1]:.1f}"]
    for (one, other), ((_, above), (below, end)) in zip(
        itertools.pairwise(wire.xs), itertools.pairwise(spans), strict=True
    ):
        middle = (above + below) / 2
        path.append(
            f"C{_format_point(one, middle)} {_format_point(other, middle)} {_format_point(other, below)}V{end:.1f}"
        )
    return "".join(path), spans[0][0]


def _span(wire: LayoutEdge, place: int, box: BoxLayout) -> tuple[float, float]:
    """From where to where a line goes straight down at one of its places."""
    layer, tops = wire.layers[place], box.tops
    if layer < 0:
        return box.heading.height, box.heading.height
    if layer == len(box.layers):
        return box.height, box.height
    top, bottom = tops[layer], tops[layer] + box.tall(box.layers[layer])
    if not place and wire.source is not None:
        source = box.inner[wire.source]
        top = source.y + source.height + source.behind
    if place == len(wire.xs) - 1 and wire.target is not None:
        bottom = box.inner[wire.target].y
    return top, bottom


def _mark_elements(mark: AdapterMark, width: float, y: float) -> Iterator[str]:
    off = "" if mark.strength else " off"
    yield f'<g class="mark c{mark.colour} {_escape_html(mark.state.replace(" ", "-"))}{off}">'
    yield _rectangle("chip", 7, y, width - 14, MARK - 3, 4)
    yield f'<rect class="bar" x="7" y="{y:g}" width="5" height="{MARK - 3:g}"/>'
    name = _truncate(mark.adapter)
    yield f'<text class="adapter" x="17" y="{y + 12:g}">{_escape_html(name)}</text>'
    beside_name = 17 + (len(name) + 1) * CHARACTER
    yield f'<text class="form" x="{beside_name:.0f}" y="{y + 12:g}">{_escape_html(mark.form)}</text>'
    yield f'<text class="state" x="{width - 12:.0f}" y="{y + 12:g}">{_escape_html(mark.how)}</text></g>'


def _rectangle(name: str, x: float, y: float, width: float, height: float, rounded: float) -> str:
    place = f'x="{x:g}" y="{y:g}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect class="{name}" {place} rx="{rounded:g}"/>'


def _aria_label(part: Box, marks: Sequence[AdapterMark]) -> str:
    """What a screen reader says of a box."""
    count = f"{len(part.copies) + 1} times" if part.copies else ""
    adapters = "; ".join(f"{mark.adapter}: {mark.form}, {mark.how}" for mark in marks)
    return ", ".join(text for text in (part.title, part.about, count, adapters) if text)


def _format_point(x: float, y: float) -> str:
    return f"{x:.1f},{y:.1f}"


def _truncate(text: str) -> str:
    return text if len(text) <= _MAX_LABEL else text[: _MAX_LABEL - 1] + "…"


def _escape_html(text: str) -> str:
    return html.escape(text, quote=True)
