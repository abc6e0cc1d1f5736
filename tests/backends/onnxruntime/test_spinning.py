"""How an ONNX Runtime session's threads wait for work."""

from __future__ import annotations

import time

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from lorac.backends.onnxruntime.inference_session import session_options
from lorac.backends.onnxruntime.options import OnnxRuntimeOptions

_SPINS, _FOR, _STOPS = "allow_spinning", "spin_duration_us", "force_spinning_stop"


def _entry(options: OnnxRuntimeOptions, name: str) -> str | None:
    settings = session_options(options)
    try:
        return str(settings.get_session_config_entry(name))
    except RuntimeError:  # there is none
        return None


@pytest.mark.parametrize(
    ("spinning", "wanted"), [(None, ("1", "20", "1")), (True, ("1", None, None)), (False, ("0", None, None))]
)
def test_sets_the_entries_of_spinning(spinning: bool | None, wanted: tuple[str | None, ...]) -> None:
    options = OnnxRuntimeOptions(spinning=spinning)
    names = (f"session.intra_op.{_SPINS}", f"session.intra_op.{_FOR}", f"session.{_STOPS}")
    assert tuple(_entry(options, name) for name in names) == wanted


def test_threads_are_asleep_between_calls() -> None:
    """Left to ONNX Runtime they go on waiting busily for tens of milliseconds after a call."""
    settings = session_options(OnnxRuntimeOptions(threads=2))
    session = ort.InferenceSession(_product().SerializeToString(), settings, providers=["CPUExecutionProvider"])
    x = np.ones((256, 256), np.float32)
    session.run(None, {"x": x})
    begun = time.process_time()
    for _ in range(5):
        session.run(None, {"x": x})
        time.sleep(0.04)
    spent = time.process_time() - begun
    assert spent < 0.03, f"{spent * 1e3:.0f} ms of processor time"


def _product() -> onnx.ModelProto:
    """``x·x``, large enough for two threads."""
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [256, 256]) for name in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "x"], ["y"])], "product", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
