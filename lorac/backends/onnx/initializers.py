"""Initializers of emitted models: default values of slots, concatenated weights, and weights in files.

Weights are written beside the model as external data, so models may exceed 2 GB. They are memory-mapped, not read.
"""

import itertools
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype

from lorac.backends.onnx.model_files import MODEL_FILE, WEIGHTS_FILE

_EXTERNAL_SIZE = 1024
"""Bytes from which a weight is written to a file of its own."""
_MATRIX, _MAX_ITEM_SIZE = 2, 8
_Array = np.ndarray


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
        constants: slot name -> value.
    """
    for value in _fill_slots(model, constants):
        model.graph.inputs.remove(value)


def set_slot_defaults(model: ir.Model, defaults: Mapping[str, torch.Tensor]) -> None:
    """Make slot inputs optional in place, with default values by slot name."""
    _fill_slots(model, defaults)


def concatenate_weights(model: ir.Model) -> None:
    """Replace each concatenation of weights by one stored weight, in place."""
    initializers, joined = model.graph.initializers, dict[tuple[ir.Value, ...], ir.Value]()
    for node in [node for node in model.graph if node.op_type == "Concat" and node.attributes.get_int("axis") == 0]:
        parts = [value for value in node.inputs if value is not None and initializers.get(str(value.name)) is value]
        tensors = [part.const_value for part in parts if part.const_value is not None]
        if len(tensors) < len(node.inputs):
            continue
        key = tuple(parts)
        if key not in joined:
            # ``attn.q|k.weight`` for ``attn.q.weight`` and ``attn.k.weight``
            columns = itertools.zip_longest(*(str(part.name).split(".") for part in parts), fillvalue="")
            tensor, name = ConcatenatedTensor(tensors), ".".join("|".join(dict.fromkeys(column)) for column in columns)
            joined[key] = ir.val(name, const_value=tensor, shape=tensor.shape, dtype=tensor.dtype)
            model.graph.register_initializer(joined[key])
        node.outputs[0].replace_all_uses_with(joined[key], replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
    for part in {part for parts in joined for part in parts}:
        if not part.uses():
            initializers.pop(str(part.name), None)


class ConcatenatedTensor(ir.LazyTensor):
    """A lazy concatenation of tensors along their first axis.

    The array is computed when it is read, and recomputed after its last reference is gone.

    Args:
        parts: the tensors, of one dtype.
        is_transposed: whether the tensors are matrices, and this is the transpose of their concatenation.
    """

    def __init__(self, parts: Sequence[ir.TensorProtocol], *, is_transposed: bool = False) -> None:
        rows, *others = zip(*(tensor.shape.numpy() for tensor in parts), strict=True)
        sizes = [sum(rows), *(sizes[0] for sizes in others)]
        super().__init__(self._compute, parts[0].dtype, ir.Shape(sizes[::-1] if is_transposed else sizes))
        self._parts, self._is_transposed = parts, is_transposed
        self._computed: list[weakref.ref[_Array]] = []

    @property
    def transposed(self) -> "ConcatenatedTensor":
        """Return the transpose of the matrix, without computing an array."""
        return ConcatenatedTensor(self._parts, is_transposed=not self._is_transposed)

    def _compute(self) -> ir.Tensor[_Array]:
        array = self._computed.pop()() if self._computed else None
        if array is None:
            arrays = [tensor.numpy() for tensor in self._parts]
            turned = (_contiguous_copy(array.T) for array in arrays)
            array = np.concatenate([*turned], axis=1) if self._is_transposed else np.concatenate(arrays)
        self._computed.append(weakref.ref(array))
        return ir.Tensor(array)


def _make_contiguous(tensor: ir.Tensor[_Array]) -> ir.TensorProtocol:
    """Return a tensor that becomes contiguous when it is written, since NumPy writes other arrays value by value."""
    array = tensor.raw
    if not isinstance(array, np.ndarray) or array.flags.c_contiguous:
        return tensor

    def compute() -> ir.Tensor[_Array]:
        return ir.Tensor(_contiguous_copy(array), dtype=tensor.dtype, shape=tensor.shape, name=tensor.name)

    return ir.LazyTensor(compute, dtype=tensor.dtype, shape=tensor.shape, name=tensor.name)


def _contiguous_copy(array: _Array) -> _Array:
    """Return a contiguous copy; torch copies a transposed matrix several times faster than NumPy."""
    is_transposed = array.ndim == _MATRIX and array.flags.f_contiguous and array.flags.writeable
    if not is_transposed or array.itemsize > _MAX_ITEM_SIZE:
        return np.ascontiguousarray(array)
    whole_numbers = torch.from_numpy(array.T.view(f"i{array.itemsize}"))  # torch lacks some of NumPy's dtypes
    return whole_numbers.t().contiguous().numpy().view(array.dtype)


def _fill_slots(model: ir.Model, contents: Mapping[str, torch.Tensor]) -> list[ir.Value]:
    """Make slot inputs initializers as well, and return them."""
    filled = [value for value in model.graph.inputs if value.name in contents]
    for value in filled:
        name = str(value.name)
        tensor = contents[name]

        def compute(name: str = name, tensor: torch.Tensor = tensor) -> ir.TensorProtocol:
            return TorchTensor(tensor.detach().contiguous(), name=name)

        # Contiguous only when it is written, so that few transposed copies exist at a time.
        dtype, shape = from_torch_dtype(tensor.dtype), ir.Shape(tensor.shape)
        value.const_value = ir.LazyTensor(compute, dtype=dtype, shape=shape, name=name)
        model.graph.initializers[name] = value
    return filled
