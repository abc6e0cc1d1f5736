"""Which arguments of an example call a program holds as constants, and which it can neither take nor hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lorac.frontend.capture.call_arguments import CallArguments
from lorac.frontend.host import Host
from lorac.ir.calls.call import to_json_value
from tests.refusing import refuses

X = torch.zeros(2, 3)


def test_arguments_without_tensors_are_constants():
    named = {"x": X, "pair": [X, {"y": X}], "sizes": [(2, 4), (1, 3)], "flag": True, "mode": "spatial"}
    found = CallArguments.of(Host.of(nn.Linear(3, 2)), named)
    assert found.inputs.keys() == {"x", "pair"}
    assert found.trace_constants == {"sizes": [(2, 4), (1, 3)], "flag": True, "mode": "spatial"}


@pytest.mark.parametrize("value", [np.zeros(3), [1, X], {"a": X, "b": "text"}, torch.float32, {1: 2}, float("nan")])
def test_rejects_constants_that_calls_cannot_be_compared_with(value: Any):
    with refuses("capture_failed", match="the argument 'value' holds ") as error:
        CallArguments.of(Host.of(nn.Linear(3, 2)), {"x": X, "value": value})
    assert "target='eager'" in str(error.value)


def test_equal_values_have_the_same_json():
    held = [torch.tensor([[2, 4]]), np.array([[2, 4]]), ((2, 4),), [[np.int64(2), 4]]]
    assert [to_json_value(value) for value in held] == [[[2, 4]]] * 4
    assert to_json_value({"sizes": (1, 2)}) == {"sizes": [1, 2]}
