"""The sizes that a program accepts: rejected ones, other sizes to try, and stored conditions."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import lorac
from lorac.ir.calls.sizes import SizeConstraints, find_axes

IDS, LENGTH = ("ids", 0), ("ids", 1)
MASK, WIDTH = ("mask", 0), ("mask", 1)
TEXT = SizeConstraints(
    shapes={"ids": (None, None), "mask": (None, None)},
    conditions=("ids[1] <= 64", "mask[0] == ids[0]", "mask[1] == ids[1]"),
    assumed=("ids[0] >= 2", "ids[1] >= 2", "ids[0]*ids[1] != 1"),
)


def _given(**shapes: tuple[int, ...]) -> dict[str, Any]:
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def test_accepts_tensors_arrays_and_lists():
    TEXT.check(_given(ids=(3, 9), mask=(3, 9)))
    TEXT.check({"ids": np.zeros((1, 64)), "mask": [[1.0] * 64]})


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        ({"ids": (3, 9), "mask": (3, 8)}, "the model joins inputs that differ: size 9 on axis 1 of 'ids' and size 8"),
        ({"ids": (3, 65), "mask": (3, 65)}, "size 65 on axis 1 of 'ids': it needs ids[1] <= 64"),
        ({"ids": (3,), "mask": (3, 9)}, "input 'ids' has shape [3]; the program was captured for [any, any]"),
    ],
)
def test_rejects_sizes_by_input_and_axis(shapes: dict[str, tuple[int, ...]], text: str):
    with pytest.raises(lorac.InputMismatch) as error:
        TEXT.check(_given(**shapes))
    assert text in str(error.value)


def test_distinguishes_traced_from_requested_sizes():
    sizes = SizeConstraints(shapes={"x": (2, 6)}, fixed=(("x", 0),))
    with pytest.raises(lorac.InputMismatch, match="size 3 on axis 0; the trace of the model fixed 2"):
        sizes.check(_given(x=(3, 6)))
    with pytest.raises(lorac.InputMismatch, match=r"fixed 2, at model\.py:7: for row in x"):
        replace(sizes, lines={("x", 0): "model.py:7: for row in x"}).check(_given(x=(3, 6)))
    with pytest.raises(lorac.InputMismatch, match=r"shape \[2, 7\]; the program was captured for \[2, 6\]"):
        sizes.check(_given(x=(2, 7)))


def test_finds_other_sizes_that_meet_all_conditions():
    assert TEXT.find_other({IDS: 2, LENGTH: 7, MASK: 2, WIDTH: 7}) == {IDS: 3, LENGTH: 8, MASK: 3, WIDTH: 8}
    at_most = TEXT.find_other({IDS: 2, LENGTH: 64, MASK: 2, WIDTH: 64})
    assert at_most == {IDS: 3, LENGTH: 64, MASK: 3, WIDTH: 64}, "where one cannot change, the others do"
    patches = SizeConstraints(shapes={"x": (None,)}, conditions=("x[0] % 16 == 0",))
    assert patches.find_other({("x", 0): 32}) == {("x", 0): 48}
    double = SizeConstraints(shapes={"x": (None,), "y": (None,)}, conditions=("x[0] == 2*y[0]",))
    assert double.find_other({("x", 0): 4, ("y", 0): 2}) == {("x", 0): 8, ("y", 0): 4}
    image = SizeConstraints(shapes={"x": (None, None)}, conditions=("x[1] % 8 == 0",))
    assert image.find_other({("x", 0): 2, ("x", 1): 16}) == {("x", 0): 3, ("x", 1): 24}, (
        "rows change by one, not by eight"
    )
    assert SizeConstraints(shapes={"x": (2,)}).find_other({}) is None


def test_the_least_sizes_are_tried_alone_and_together():
    found = TEXT.find_smallest({IDS: 3, LENGTH: 8, MASK: 3, WIDTH: 8})
    assert found == [
        {IDS: 1, LENGTH: 8, MASK: 1, WIDTH: 8},
        {IDS: 3, LENGTH: 1, MASK: 3, WIDTH: 1},
        {IDS: 1, LENGTH: 1, MASK: 1, WIDTH: 1},
    ]
    one_more = SizeConstraints(
        shapes={"x": (None,), "y": (None,)}, conditions=("x[0] == 1 + y[0]",), assumed=("y[0] >= 2",)
    )
    assert one_more.find_smallest({("x", 0): 4, ("y", 0): 3})[-1] == {("x", 0): 2, ("y", 0): 1}


def test_keeps_assumptions_unless_counterexamples_are_right():
    sizes = SizeConstraints(shapes={"x": (None,)}, assumed=("x[0] >= 2", "x[0] % 3 != 0"))
    tried = sizes.find_doubtful({("x", 0): 5})
    assert tried == [{("x", 0): 1}, {("x", 0): 6}]
    assert sizes.resolve_assumptions(tried[:1]).conditions == ("x[0] % 3 != 0",)
    assert sizes.resolve_assumptions(tried).conditions == ()
    assert sizes.resolve_assumptions([]).conditions == sizes.assumed


def test_sizes_are_the_same_from_json():
    sizes = SizeConstraints(
        {"x": (None, 6), "y": (None, 7)}, ("x[0] == max(1, y[0]) or not x[0] < -2",), fixed=(("y", 1),)
    )
    assert SizeConstraints.from_json(json.loads(json.dumps(sizes.to_json()))) == sizes


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "x[0].real == 1",
        "x[0] ** 9 ** 9 > 1",
        "x[0] == y[0]",
        "x[1] == 6",
        "x[0] << 70 > 1",
        "(lambda: 1)()",
        "x[0] == 'a'",
        "x[0] == 1.5",
        "[0 for _ in x]",
        "max() > 1",
        "(" * 5000 + "1" + ")" * 5000,
        "-" * 15_000 + "1",
        "x[0] > 0" + " + 1" * 10_000,
        "9" * 5000 + " > 1",
        "",
        "\0",
    ],
)
def test_a_stored_condition_holds_nothing_but_sizes_and_arithmetic(text: str):
    stored = {"shapes": {"x": [None, 6]}, "conditions": [text], "fixed": []}
    with pytest.raises(lorac.ArtifactError, match="which is not a condition on its sizes"):
        SizeConstraints.from_json(stored)


def test_a_condition_that_divides_by_nothing_is_not_met():
    with pytest.raises(lorac.InputMismatch):
        SizeConstraints(shapes={"x": (None,)}, conditions=("4 % (x[0] // 2) == 0",)).check(_given(x=(1,)))
    assert find_axes("4 % (x[0] // 2) == 0") == {("x", 0)}
