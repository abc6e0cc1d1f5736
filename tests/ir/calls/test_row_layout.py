"""Where the rows of a call are, and how a call of any number of them is one of several."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import lorac
from lorac.frontend.host import Host
from lorac.frontend.inputs.dynamic_shapes import find_row_layout
from lorac.ir.calls.row_layout import LIST_AXIS, RowLayout

ROWS = RowLayout(2, {"x": 0, "pieces": 0, "sizes": 0})


def _call(rows: int) -> dict[str, object]:
    x = torch.arange(rows * 3).reshape(rows, 3)
    return {"x": x, "pieces": np.arange(rows * 2), "sizes": [[i, i] for i in range(rows)], "scale": 4}


def test_finds_inputs_whose_size_is_a_multiple_of_the_rows():
    inputs = {"x": torch.zeros(2, 3), "pieces": torch.zeros(6, 1), "table": torch.zeros(3, 2)}
    assert find_row_layout(Host.of(nn.Identity()), inputs, {"sizes": torch.zeros(2, 2)}) == RowLayout(
        2, {"x": 0, "pieces": 0, "sizes": 0}
    )
    assert find_row_layout(Host.of(nn.Identity()), {"flag": torch.zeros(())}, {}) is None


def test_a_call_in_parts_with_its_last_row_once_more():
    first, second = ROWS.split(_call(3))
    assert [part["x"][:, 0].tolist() for part in (first, second)] == [[0, 3], [6, 6]]
    assert [part["pieces"].tolist() for part in (first, second)] == [[0, 1, 2, 3], [4, 5, 4, 5]]
    assert (second["sizes"], second["scale"]) == ([[2, 2], [2, 2]], 4)
    assert ROWS.count_rows(_call(3)) == 3


def test_rejects_rows_of_unequal_shares():
    with pytest.raises(lorac.InputMismatch, match="'pieces' has size 7 on axis 0, which does not divide into 3 rows"):
        ROWS.split({**_call(3), "pieces": np.arange(7)})


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_outputs_are_joined_along_their_rows_and_cut(kind):
    parts = [kind([[1, 2, 3, 4]]), kind([[5, 6, 7, 8]])]
    assert ROWS.join(parts, 3, 1).tolist() == [[1, 2, 3, 4, 5, 6]]
    assert ROWS.join(parts, 3, None).tolist() == [[1, 2, 3, 4]]


def test_the_axis_that_grows_with_the_rows():
    assert ROWS.find_axis((1, 4, 5), (1, 6, 5), 3) == 1
    assert ROWS.find_axis((1, 4, 5), (1, 7, 5), 3) is None
    assert ROWS.find_axis((2, 4), (3, 6), 3) is None


def test_round_trips_and_rejects_an_invalid_layout():
    rows = RowLayout(2, {"x": 0}, {"features": LIST_AXIS, "logits": 0})
    assert RowLayout.from_json(rows.to_json()) == rows
    with pytest.raises(lorac.ArtifactError, match="layout of rows is damaged"):
        RowLayout.from_json({**rows.to_json(), "count": 0})
