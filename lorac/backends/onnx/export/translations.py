"""ONNX for ops that reach the emitter: one function per op, which takes precedence over torch's translation."""

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import to_torch_dtype

from lorac.backends.onnx.export.attention import attention, cached_attention
from lorac.backends.onnx.export.opsets import Outputs, op
from lorac.backends.onnx.export.recurrence import recurrence
from lorac.ir.graph import attention_ops, ops, segment_ops
from lorac.ir.graph.ops import RECURRENCE
from lorac.ir.slots.places import CONVOLVE_SEGMENTS

aten = torch.ops.aten
ADAPTIVE_MEANS = (
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
)
_MATRIX = 2
_INT64_MAX = 2**63 - 1
_WIDE_DTYPES = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


def split_with_sizes(x: ir.Value, sizes: Sequence[int | ir.Value], dim: int = 0) -> Outputs:
    """Write ``Split``; torch's translation makes a sequence and extracts each part from it.

    Sizes are numbers, or values if the size of a part depends on an input.
    """
    if len(sizes) == 1:
        return [op.Identity(x)]
    if all(isinstance(size, int) for size in sizes):
        split = op.Constant(value_ints=list(sizes))
    else:
        one = op.Constant(value_ints=[1])
        values = [op.Constant(value_int=size) if isinstance(size, int) else size for size in sizes]
        split = op.Concat(*(op.Reshape(value, one) for value in values), axis=0)
    return op.Split(x, split, axis=dim, num_outputs=len(sizes))


def slice_tensor(
    x: ir.Value,
    dim: int = 0,
    start: int | ir.Value | None = None,
    end: int | ir.Value | None = None,
    step: int | ir.Value = 1,
) -> Outputs:
    """Write ``Slice``; torch's translation casts and reshapes each number, which is slow to fold again."""
    vectors = [
        op.Constant(value_ints=[size])
        if isinstance(size, int)
        else op.Reshape(op.Cast(size, to=ir.DataType.INT64), op.Constant(value_ints=[-1]))
        for size in (0 if start is None else start, _INT64_MAX if end is None else end, dim, step)
    ]
    return op.Slice(x, *vectors)


def linear(x: ir.Value, weight: ir.Value, bias: ir.Value | None, site: str) -> Outputs:
    """Write ``aten.linear`` as torch's translation does, so that ONNX Runtime applies the same fusions."""
    assert x.shape is not None
    if len(x.shape) == _MATRIX:
        return op.Gemm(x, weight, bias, transB=1)
    y = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
    return y if bias is None else op.Add(y, bias)


def matmul(x: ir.Value, matrix: ir.Value) -> Outputs:
    """Write ``MatMul``."""
    return op.MatMul(x, matrix)


def sym_numel(x: ir.Value) -> Outputs:
    """Write ``Size``."""
    return op.Size(x)


def conv3d(
    x: ir.Value,
    weight: ir.Value,
    bias: ir.Value | None = None,
    stride: Sequence[int] = (1, 1, 1),
    padding: Sequence[int] = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
) -> Outputs:
    """Write ``Conv``; without a bias, torch's translation adds zeros of another rank, which no runtime accepts."""
    pads = [*padding, *padding]
    return op.Conv(x, weight, bias, strides=list(stride), pads=pads, dilations=list(dilation), group=groups)


def adaptive_avg_pool(x: ir.Value, sizes: Sequence[int]) -> Outputs:
    """Write a mean over the windows of each axis; torch's decomposition fixes the windows to the example's size."""
    for axis, count in zip(range(-len(sizes), 0), sizes, strict=True):
        axes = op.Constant(value_ints=[axis])
        size, number = op.Shape(x, start=axis, end=axis + 1 or None), op.Constant(value_ints=[count])
        means = []
        for window in range(count):
            first, after = (op.Constant(value_ints=[window]), op.Constant(value_ints=[window + 1]))
            begin = op.Div(op.Mul(size, first), number)
            end = op.Div(op.Add(op.Mul(size, after), op.Constant(value_ints=[count - 1])), number)
            means.append(op.ReduceMean(op.Slice(x, begin, end, axes), axes, keepdims=1))
        x = op.Concat(*means, axis=axis)
    return x


def rms_norm(
    x: ir.Value, sizes: Sequence[int | ir.Value], weight: ir.Value | None = None, eps: float | None = None
) -> Outputs:
    """Write the ops of torch's decomposition, with half precision computed in float32; torch has no translation."""
    assert x.dtype is not None
    wide = x.dtype if x.dtype in _WIDE_DTYPES else ir.DataType.FLOAT
    y = _cast(x, wide)
    axes = op.Constant(value_ints=list(range(-len(sizes), 0)))
    eps = torch.finfo(to_torch_dtype(wide)).eps if eps is None else eps
    mean = op.ReduceMean(op.Pow(y, _scalar(2.0, wide)), axes, keepdims=1)
    y = op.Mul(y, op.Reciprocal(op.Sqrt(op.Add(mean, _scalar(eps, wide)))))
    return _cast(y if weight is None else op.Mul(y, _cast(weight, wide)), x.dtype)


def _cast(x: ir.Value, dtype: ir.DataType) -> ir.Value:
    return x if x.dtype == dtype else op.Cast(x, to=dtype)


def _scalar(number: float, dtype: ir.DataType) -> ir.Value:
    return op.Constant(value=ir.tensor(number, dtype))


def row_positions(ids: ir.Value) -> Outputs:
    """Write ``Range`` along the last axis, in every row."""
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    return op.Expand(op.Range(zero, op.Squeeze(op.Shape(ids, start=1, end=2)), one), op.Shape(ids))


def gather_rows(x: ir.Value, positions: ir.Value) -> Outputs:
    """Write ``GatherND`` in each row."""
    return op.GatherND(x, op.Unsqueeze(positions, op.Constant(value_ints=[-1])), batch_dims=1)


def cut_segments(x: ir.Value, slot: ir.Value, features: int) -> Outputs:
    """Write ``Reshape`` to (places, items, features), with the number of items inferred."""
    assert x.shape is not None
    places, items = op.Shape(slot, start=0, end=1), op.Constant(value_ints=[-1])
    return op.Reshape(x, op.Concat(places, items, *_last_sizes(x, len(x.shape) - features), axis=0))


def join_segments(y: ir.Value, like: ir.Value, features: int) -> Outputs:
    """Write ``Reshape`` to the leading sizes of another value, followed by the features."""
    leading = op.Shape(like, start=0, end=-features) if features else op.Shape(like)
    return op.Reshape(y, op.Concat(leading, *_last_sizes(y, 2), axis=0))


def convolve_segments(
    x: ir.Value, kernels: ir.Value, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Outputs:
    """Write a ``Scan`` over the places, which runs one ``Conv`` per place."""
    assert x.shape is not None and kernels.shape is not None and x.dtype is not None
    part, kernel, y = (ir.val(name, x.dtype) for name in ("segment", "kernel", "convolved"))
    part.shape, kernel.shape = ir.Shape(x.shape[1:]), ir.Shape(kernels.shape[1:])
    y.shape = ir.Shape([None] * len(part.shape))
    settings = {"strides": [*stride], "pads": [*padding, *padding], "dilations": [*dilation]}
    body = ir.Graph([part, kernel], [y], nodes=[ir.node("Conv", [part, kernel], settings, outputs=[y])], name="place")
    return op.Scan(x, kernels, body=body, num_scan_inputs=2)


def _last_sizes(x: ir.Value, first: int) -> list[ir.Value]:
    """Return the sizes of a value from an axis to the last, as values to concatenate."""
    assert x.shape is not None
    sizes = [*x.shape][first:]
    if not sizes:
        return []
    fixed = all(isinstance(size, int) for size in sizes)
    return [op.Constant(value_ints=sizes) if fixed else op.Shape(x, start=first)]


TRANSLATIONS: Mapping[Callable[..., object], Callable[..., Outputs]] = {
    ops.SPLIT: split_with_sizes,
    ops.LINEAR: linear,
    ops.MATMUL: matmul,
    segment_ops.CUT: cut_segments,
    segment_ops.JOIN: join_segments,
    CONVOLVE_SEGMENTS: convolve_segments,
    aten.slice.Tensor: slice_tensor,
    aten.sym_numel.default: sym_numel,
    aten.conv3d.default: conv3d,
    **dict.fromkeys(ADAPTIVE_MEANS, adaptive_avg_pool),
    aten.rms_norm.default: rms_norm,
    aten.scaled_dot_product_attention.default: attention,
    attention_ops.POSITIONS: row_positions,
    attention_ops.ROWS: gather_rows,
    attention_ops.CACHED_ATTENTION: cached_attention,
    RECURRENCE: recurrence,
}
"""Op -> its ONNX."""


def drop_split_counts(model: ir.Model) -> None:
    """Drop ``num_outputs`` of a ``Split`` with given sizes, which the recorder requires but ONNX forbids."""
    for node in model.graph.all_nodes():
        if node.op_type == "Split" and len(node.inputs) > 1 and node.inputs[1] is not None:
            node.attributes.pop("num_outputs", None)
