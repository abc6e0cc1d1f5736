"""Nodes that a stranger's model may hold: the op refuses them, where it would read or write beyond a tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from lorac.backends.onnxruntime.native_op import DOMAIN, OP
from lorac.native_library import OP_VERSION
from tests.native.library import needs_compiler

pytestmark = needs_compiler
Array = np.ndarray
REFUSALS = (ort.capi.onnxruntime_pybind11_state.InvalidArgument, ort.capi.onnxruntime_pybind11_state.RuntimeException)
SOUND: Mapping[str, Array] = {
    "x": np.ones((4, 8), np.float32),
    "base": np.zeros((4, 6), np.float32),
    "a": np.ones((8, 2), np.float32),
    "b": np.ones((2, 6), np.float32),
}


def answer(
    package: Path, feeds: Mapping[str, Array], inputs: Sequence[str], outputs: Sequence[str], **attributes: Any
) -> list[Array]:
    """Return what one node answers; ``inputs`` and ``outputs`` are the names that it states."""
    types = {np.float32: TensorProto.FLOAT, np.int32: TensorProto.INT32}
    given = [helper.make_tensor_value_info(name, types[array.dtype.type], None) for name, array in feeds.items()]
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs if name]
    node = helper.make_node(OP, inputs, outputs, domain=DOMAIN, **attributes)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, OP_VERSION)]
    model = helper.make_model(helper.make_graph([node], "node", given, made), opset_imports=opsets, ir_version=10)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 4
    settings.register_custom_ops_library(str(package / "lorac_native" / "liblorac_native.so"))
    return list(ort.InferenceSession(model.SerializeToString(), settings).run(None, dict(feeds)))


def test_accepts_a_sound_node(native: Path) -> None:
    (found,) = answer(native, SOUND, ["x", "base", "a", "b"], ["y"], widths=[6], parts=[1])
    assert np.array_equal(found, np.full((4, 6), 16.0))


@pytest.mark.parametrize(
    ("inputs", "outputs", "widths", "parts"),
    [
        (["x", "base", "a"], ["y"], [6], [1]),
        (["x", "base", "b"], ["y"], [6], [3]),
        (["x", "base", "a", "b", "b", "b"], ["y"], [6], [1]),
        (["x", "base", "a", "b"], ["y"], [3, 3], [0, 0]),
        (["x", "base", "a", "b"], ["y", "z"], [6], [1]),
        (["x", "base", "b"], ["", "y"], [3, 3], [0, 0]),
        (["x", "base", "b"], ["y", ""], [3, 3], [0, 0]),
        (["x", "base", "a", "b"], ["y"], [6], [1 << 40 | 1]),
        (["x", "base", "a", "b", "b"], ["y"], [6], [17]),
        (["x", "base", "b"], ["y", "z"], [-3, 9], [0, 0]),
        (["x", "base", "b"], ["y", "z"], [-(1 << 63), 6 - (1 << 63)], [0, 0]),
    ],
    ids=[
        "an input too few", "of parts", "an input too many", "an output too few", "an output too many",
        "no first output", "no last output", "unknown part", "residual of another size",
        "negative width", "widths that wrap",
    ],
)  # fmt: skip
def test_rejects_other_numbers_of_inputs_and_outputs(
    inputs: list[str], outputs: list[str], widths: list[int], parts: list[int], native: Path
) -> None:
    with pytest.raises(REFUSALS, match="AddLowRank"):
        answer(native, SOUND, inputs, outputs, widths=widths, parts=parts)


@pytest.mark.parametrize(
    ("shapes", "width"),
    [
        ({"x": (4, 0), "base": (4, 0), "a": (0, 1 << 28), "b": (1 << 28, 0)}, 0),
        ({"x": (16, 16), "base": (16, 16), "a": (0, 1 << 60), "b": (0, 16)}, 16),
        ({"x": (0, 16), "base": (1 << 60, 0), "a": (16, 2), "b": (2, 0)}, 0),
        ({"a": (1 << 40, 8, 0), "b": (1 << 40, 0, 6)}, 6),
        ({"b": (6, 2)}, 6),
    ],
    ids=["rank without features", "rank that wraps", "rows that wrap", "places", "transposed"],
)
def test_rejects_sizes_that_no_values_stand_behind(
    shapes: Mapping[str, tuple[int, ...]], width: int, native: Path
) -> None:
    feeds = {**SOUND, **{name: np.zeros(shape, np.float32) for name, shape in shapes.items()}}
    with pytest.raises(REFUSALS, match="AddLowRank"):
        answer(native, feeds, ["x", "base", "a", "b"], ["y"], widths=[width], parts=[1])
