"""Weights are written as they are, however they lie in memory, and each is laid out once."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import lorac
from lorac.backends.onnx import build
from lorac.backends.onnx import initializers as writing
from lorac.backends.onnx.model_files import MODEL_FILE, WEIGHTS_FILE

DTYPES = (np.float32, np.float64, np.int8, ml_dtypes.bfloat16, np.complex128)
WAYS = {
    "turned": lambda values: values.T,
    "every other row": lambda values: values[::2],
    "backwards": lambda values: values[::-1],
    "read only": lambda values: _read_only(values).T,
    "axes moved": lambda values: values.reshape(8, 6, -1).transpose(2, 0, 1),
}


def _read_only(values):
    copied = values.copy()
    copied.flags.writeable = False
    return copied


def _model(array):
    weight = ir.Value(name="weight", const_value=ir.Tensor(array, name="weight"))
    y = ir.Node("", "Identity", [weight])
    y.outputs[0].name = "y"
    graph = ir.Graph([], y.outputs, nodes=[y], initializers=[weight], opset_imports={"": 18}, name="main")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_weights_are_written_in_the_order_of_their_axes(tmp_path, monkeypatch, dtype, way):
    array = WAYS[way](np.arange(48 * 60).reshape(48, 60).astype(dtype))
    saved, save = [], ir.save
    monkeypatch.setattr(ir, "save", lambda model, *where, **how: (saved.append(model), save(model, *where, **how)))
    writing.write_model(_model(array), tmp_path)
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == array.tobytes()
    read = ir.load(tmp_path / MODEL_FILE).graph.initializers["weight"].const_value
    assert read.dtype == ir.DataType.from_numpy(np.dtype(dtype))
    assert read.shape.numpy() == array.shape
    assert saved[0].graph.initializers["weight"].const_value.numpy().flags.c_contiguous


def test_joined_weights_are_laid_out_once_for_all_that_hold_them():
    parts = [np.full((2, 3), number, np.float32) for number in (1, 2)]
    joined = writing.ConcatenatedTensor([ir.Tensor(part) for part in parts])
    view = joined.numpy().T
    assert np.shares_memory(joined.numpy(), view)
    np.testing.assert_array_equal(view, np.concatenate(parts).T)
    del view
    np.testing.assert_array_equal(joined.numpy(), np.concatenate(parts))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_turned_joined_weights_lie_in_order(dtype):
    parts = [np.arange(6 * rows).reshape(rows, 6).astype(dtype) for rows in (3, 5)]
    turned = writing.ConcatenatedTensor([ir.Tensor(part) for part in parts]).transposed
    assert turned.shape.numpy() == (6, 8)
    assert turned.numpy().flags.c_contiguous
    np.testing.assert_array_equal(turned.numpy(), np.concatenate(parts).T)
    np.testing.assert_array_equal(turned.transposed.numpy(), np.concatenate(parts))


class _Pair(nn.Module):
    """Two layers that read one input, and are computed as one."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(48, 40, bias=False), nn.Linear(48, 24, bias=False)

    def forward(self, x):
        return self.one(x).sum(-1) + self.other(x).sum(-1)


def test_joined_weights_are_laid_out_once_they_are_written(monkeypatch):
    laid_out, after_emission = [], []
    copy, emit = writing._contiguous_copy, build.emit

    def noting(array):
        laid_out.append(array.shape)
        return copy(array)

    def emitting(*given):
        model = emit(*given)
        after_emission.append(len(laid_out))
        return model

    monkeypatch.setattr(writing, "_contiguous_copy", noting)
    monkeypatch.setattr(build, "emit", emitting)
    inputs = {"x": torch.randn(2, 3, 48)}
    lorac.compile(_Pair().eval(), {"a": lorac.LoRA(r=2)}, target="onnxruntime", example_inputs=inputs)
    assert after_emission == [0]
    assert laid_out == [(48, 40), (48, 24)]
