"""Writing emitted models: what their slots hold unless something is given for them, and where their weights lie.

Weights go beside the model as external data, so that models over 2 GB work, and they are mapped instead of read.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype

from lorac.backends.onnx.model_files import MODEL_FILE, WEIGHTS_FILE

_EXTERNAL_SIZE = 1024
"""Bytes from which a weight lies beside the model."""
_MATRIX, _MAX_ITEM_SIZE = 2, 8
_Array = np.ndarray[Any, Any]


def write_model(model: ir.Model, folder: Path) -> None:
    """Write a model and its weights into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.Tensor) and value.const_value.nbytes >= _EXTERNAL_SIZE:
            value.const_value = _make_contiguous(value.const_value)
    ir.save(model, folder / MODEL_FILE, external_data=WEIGHTS_FILE, size_threshold_bytes=_EXTERNAL_SIZE)


def bake_slots(model: ir.Model, constants: Mapping[str, torch.Tensor]) -> None:
    """Turn slot inputs into constants, in place.

    Args:
        model: as emitted.
        constants: slot name -> value.
    """
    for value in _fill_slots(model, constants):
        model.graph.inputs.remove(value)


def set_slot_defaults(model: ir.Model, defaults: Mapping[str, torch.Tensor]) -> None:
    """Give slot inputs a value that holds where a caller gives none, in place: ONNX's optional inputs.

    Args:
        model: as emitted.
        defaults: slot name -> value.
    """
    _fill_slots(model, defaults)


def concatenate_weights(model: ir.Model) -> None:
    """Write weights that the model reads one behind the other as one weight, in place."""
    initializers, made = model.graph.initializers, dict[tuple[ir.Value, ...], ir.Value]()
    for node in [node for node in model.graph if node.op_type == "Concat" and node.attributes.get_int("axis") == 0]:
        parts = [value for value in node.inputs if value is not None and initializers.get(str(value.name)) is value]
        held = [part.const_value for part in parts if part.const_value is not None]
        if len(held) < len(node.inputs):
            continue
        key = tuple(parts)
        if key not in made:
            tensor, name = ConcatenatedTensor(held), _concatenated_name([str(part.name) for part in parts])
            made[key] = ir.val(name, const_value=tensor, shape=tensor.shape, dtype=tensor.dtype)
            model.graph.register_initializer(made[key])
        node.outputs[0].replace_all_uses_with(made[key], replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
    for part in {part for parts in made for part in parts}:
        if not part.uses():
            initializers.pop(str(part.name), None)


class ConcatenatedTensor(ir.LazyTensor):
    """Tensors along their first axis, laid out when asked for, and again once nothing holds that any more.

    Args:
        parts: the tensors, of one dtype.
        turned: they are matrices, and this is their whole with its axes exchanged.
    """

    def __init__(self, parts: Sequence[ir.TensorProtocol], *, turned: bool = False) -> None:
        rows, *others = zip(*(tensor.shape.numpy() for tensor in parts), strict=True)
        sizes = [sum(rows), *(sizes[0] for sizes in others)]
        super().__init__(self._whole, parts[0].dtype, ir.Shape(sizes[::-1] if turned else sizes))
        self._parts, self._turned = parts, turned
        self._known: list[weakref.ref[_Array]] = []

    @property
    def turned(self) -> ConcatenatedTensor:
        """The same matrix with its axes exchanged; nothing is laid out for that."""
        return ConcatenatedTensor(self._parts, turned=not self._turned)

    def _whole(self) -> ir.Tensor[Any]:
        found = self._known.pop()() if self._known else None
        if found is None:
            found = _concatenate_rows([tensor.numpy() for tensor in self._parts], turned=self._turned)
        self._known.append(weakref.ref(found))
        return ir.Tensor(found)


def _concatenate_rows(arrays: Sequence[_Array], *, turned: bool) -> _Array:
    """Arrays along their first axis; turned, as a matrix whose values lie in order, its parts side by side."""
    if not turned:
        return np.concatenate(arrays)
    return np.concatenate([_contiguous_copy(array.T) for array in arrays], axis=1)


def _make_contiguous(tensor: ir.Tensor[Any]) -> ir.TensorProtocol:
    """A tensor whose values lie in memory as in a file, once it is written: NumPy writes others value by value."""
    array = tensor.raw
    if not isinstance(array, np.ndarray) or array.flags.c_contiguous:
        return tensor

    def laid_out() -> ir.Tensor[Any]:
        return ir.Tensor(_contiguous_copy(array), dtype=tensor.dtype, shape=tensor.shape, name=tensor.name)

    return ir.LazyTensor(laid_out, dtype=tensor.dtype, shape=tensor.shape, name=tensor.name)


def _contiguous_copy(array: _Array) -> _Array:
    """A copy in the order of its axes; torch makes one of a transposed matrix in a fraction of NumPy's time."""
    turned = array.ndim == _MATRIX and array.flags.f_contiguous and array.flags.writeable
    if not turned or array.itemsize > _MAX_ITEM_SIZE:
        return np.ascontiguousarray(array)
    whole_numbers = torch.from_numpy(array.T.view(f"i{array.itemsize}"))  # torch has not all of NumPy's dtypes
    return whole_numbers.t().contiguous().numpy().view(array.dtype)


def _concatenated_name(names: Sequence[str]) -> str:
    """``attn.q|k.weight`` of ``attn.q.weight`` and ``attn.k.weight``."""
    columns = itertools.zip_longest(*(name.split(".") for name in names), fillvalue="")
    return ".".join("|".join(dict.fromkeys(column)) for column in columns)


def _fill_slots(model: ir.Model, contents: Mapping[str, torch.Tensor]) -> list[ir.Value]:
    """Make slot inputs initializers too; returns them."""
    filled = [value for value in model.graph.inputs if value.name in contents]
    for value in filled:
        value.const_value = _lazy_tensor(str(value.name), contents[str(value.name)])
        model.graph.initializers[str(value.name)] = value
    return filled


def _lazy_tensor(name: str, tensor: torch.Tensor) -> ir.LazyTensor:
    """A tensor that is laid out once it is written: of transposed weights there are never many copies at a time."""

    def laid_out() -> ir.TensorProtocol:
        return TorchTensor(tensor.detach().contiguous(), name=name)

    dtype = from_torch_dtype(tensor.dtype)
    return ir.LazyTensor(laid_out, dtype=dtype, shape=ir.Shape(tensor.shape), name=name)
