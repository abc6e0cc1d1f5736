"""Writing emitted models: what their slots hold unless something is given for them, and where their weights lie.

Weights go beside the model as external data, so that models over 2 GB work, and they are mapped instead of read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
import torch

from lorac.backends.onnx.files import MODEL, WEIGHTS

_BESIDE = 1024
"""Bytes from which a weight lies beside the model."""


def write(model: ir.Model, folder: Path) -> None:
    """Write a model and its weights into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    ir.save(model, folder / MODEL, external_data=WEIGHTS, size_threshold_bytes=_BESIDE)


def bake(model: ir.Model, constants: Mapping[str, torch.Tensor]) -> None:
    """Turn slot inputs into constants, in place.

    Args:
        model: as emitted.
        constants: slot name -> value.
    """
    for value in _fill(model, constants):
        model.graph.inputs.remove(value)


def fill(model: ir.Model, defaults: Mapping[str, torch.Tensor]) -> None:
    """Give slot inputs a value that holds where a caller gives none, in place: ONNX's optional inputs.

    Args:
        model: as emitted.
        defaults: slot name -> value.
    """
    _fill(model, defaults)


def _fill(model: ir.Model, contents: Mapping[str, torch.Tensor]) -> list[ir.Value]:
    """Make slot inputs initializers too; returns them."""
    filled = [value for value in model.graph.inputs if value.name in contents]
    for value in filled:
        value.const_value = _lazily(str(value.name), contents[str(value.name)])
        model.graph.initializers[str(value.name)] = value
    return filled


def _lazily(name: str, tensor: torch.Tensor) -> ir.LazyTensor:
    """A tensor that is laid out once it is written: of transposed weights there are never many copies at a time."""

    def laid_out() -> ir.TensorProtocol:
        return ir.Tensor(tensor.detach().contiguous().numpy(), name=name)

    dtype = ir.Tensor(tensor.detach().flatten()[:0].numpy()).dtype
    return ir.LazyTensor(laid_out, dtype=dtype, shape=ir.Shape(tensor.shape), name=name)
