"""Where boxes lie: apart, inside of what holds them, and closed where they would be too tall."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest

from lorac.report.dump import dump
from lorac.report.picture.boxes import Box, BoxLink, build_boxes
from lorac.report.picture.layout import BoxLayout, HeadingSize, lay_out
from tests.captured import captured_stack


def boxes_in(box: BoxLayout) -> Iterator[BoxLayout]:
    yield box
    for child in box.inner if box.opened else ():
        yield from boxes_in(child)


def check_places(root: BoxLayout) -> None:
    """Neighbours are apart, what is inside is inside, lines go downwards and past boxes."""
    for box in boxes_in(root):
        shown = box.inner if box.opened else ()
        for one, other in itertools.combinations(shown, 2):
            beside = one.x + one.width <= other.x or other.x + other.width <= one.x
            below = one.y + one.height <= other.y or other.y + other.height <= one.y
            assert beside or below, (one.part.title, other.part.title)
        for child in shown:
            assert child.x >= 0 and child.x + child.width + child.behind <= box.width
            assert box.heading.height <= child.y and child.y + child.height + child.behind <= box.height
        for wire in box.wires if box.opened else ():
            assert list(wire.layers) == list(range(wire.layers[0], wire.layers[-1] + 1))
            assert all(0 <= x <= box.width for x in wire.xs)
            for x, layer in list(zip(wire.xs, wire.layers, strict=True))[1:-1]:
                crossed = [box.inner[n] for n in box.layers[layer]]
                assert not any(child.x < x < child.x + child.width for child in crossed)


def made_up(generator: random.Random, depth: int, name: str = "p") -> Box:
    """A box with random boxes in it, and random links downwards and across its borders."""
    if not depth or generator.random() < 0.3:
        return Box("site", name, name, "x" * generator.randrange(20))
    parts = tuple(made_up(generator, depth - 1, f"{name}.{n}") for n in range(generator.randint(1, 6)))
    links = []
    for value in range(generator.randint(0, 12)):
        ends = sorted(generator.sample(range(-1, len(parts) + 1), 2))
        source, target = (parts[n] if 0 <= n < len(parts) else None for n in ends)
        links.append(BoxLink(value, source, target))
    copies = ("other",) * generator.choice((0, 0, 2))
    return Box("module", name, name, parts=parts, links=tuple(links), copies=copies)


def size(part: Box) -> HeadingSize:
    return HeadingSize(40.0 + 7 * len(part.title + part.about), 26.0)


@pytest.mark.parametrize("seed", range(20))
def test_no_box_lies_on_another_however_they_are_joined(seed: int) -> None:
    part = made_up(random.Random(seed), 4)
    for tallest in (1e9, 400.0):
        check_places(lay_out(part, size, tallest))


def test_models_are_laid_out_as_well() -> None:
    for first_differs in (False, True):
        root = build_boxes(dump(captured_stack(first_differs=first_differs)), {})
        check_places(lay_out(root, size, 1e9))


def test_what_would_be_too_tall_is_closed() -> None:
    root = build_boxes(dump(captured_stack()), {})
    everything, less = lay_out(root, size, 1e9), lay_out(root, size, 500.0)
    assert less.height <= 500 < everything.height
    assert less.opened and not all(box.opened for box in boxes_in(less) if box.inner)
    assert less.width < everything.width, "a closed box takes no more room than its heading"
