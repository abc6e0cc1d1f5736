"""Checks before ops whose kernels do not check their operands.

With wrong shapes or offsets these kernels read beyond a tensor, and dividing the smallest integer by -1 kills the
process. A captured program has no such calls; an untrusted file may have. Observed on the CPU with torch 2.13.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lorac.errors import ArtifactError
from lorac.ir.calls.call import Call


class GuardedOp:
    """An op that is called only with operands that its check accepts.

    Args:
        fits: returns whether the operands fit together.

    Attributes:
        reads_values: whether the check needs values of tensors, not only their shapes.
    """

    def __init__(self, op: torch._ops.OpOverload, fits: Callable[..., bool]) -> None:
        self.op, self.fits, self.reads_values = op, fits, fits in _READ_VALUES
        self.__name__, self.__module__, self.__wrapped__ = f"guarded_{op._opname}", __name__, op

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Check the operands and call the op.

        Raises:
            ArtifactError: the operands do not fit together.
        """
        # While a program is exported its operands are symbolic, and nothing is computed.
        if not torch.compiler.is_compiling():
            self.check_operands(Call(args, kwargs))
        return self.op(*args, **kwargs)

    def check_operands(self, call: Call) -> None:
        """Check operands that are given in order or by name.

        Raises:
            ArtifactError: the operands do not fit together.
        """
        arguments = self.op._schema.arguments
        given = {**dict(zip((argument.name for argument in arguments), call.args, strict=False)), **call.kwargs}
        if not self.fits(*(given.get(argument.name, argument.default_value) for argument in arguments)):
            raise ArtifactError(f"the program calls '{self.op}' with operands that do not fit together")


def guard_op(op: torch._ops.OpOverload) -> Callable[..., object]:
    """Return an op, with a guard if its kernel does not check its operands."""
    fits = find_check(op)
    return op if fits is None else GuardedOp(op, fits)


def find_check(op: torch._ops.OpOverload) -> Callable[..., bool] | None:
    """Return the check of an op's operands, in the order of its arguments; None if its kernel checks them."""
    return _CHECKS.get(f"{op._opname}.{op._overloadname}", _CHECKS.get(op._opname))


def _fits_bags(
    weight: Tensor, indices: Tensor, offsets: Tensor, _a: bool, _b: int, _c: bool, _d: object, ends: bool, *_: object
) -> bool:
    bounds = torch.cat((offsets.new_zeros(1), offsets, offsets.new_full((1,), indices.numel())))
    return offsets.dim() == 1 and len(offsets) > ends and bool((bounds.diff() >= 0).all())


def _fits_batch_norm(x: Tensor, *parameters: object) -> bool:
    return all(parameter.shape == x.shape[1:2] for parameter in parameters if isinstance(parameter, Tensor))


def _fits_transform(x: Tensor, dims: Sequence[int], *_: object) -> bool:
    return 0 < len(dims) == len({*dims}) and all(0 <= dim < x.dim() and x.shape[dim] > 0 for dim in dims)


def _fits_windows(_: Tensor, *windows: Sequence[int]) -> bool:
    return all(abs(number) < _MOST_PADDING for window in windows for number in window)


def _fits_bins(_: Tensor, sizes: Sequence[int]) -> bool:
    # Beside an axis of no bins, the kernel would count to any length of another one.
    return all(size > 0 for size in sizes)


def _fits_repeats(*operands: object) -> bool:
    repeats = [operand for operand in operands[:2] if isinstance(operand, Tensor)][-1]
    return bool((repeats >= 0).all()) and float(repeats.double().sum()) < _MOST_REPEATS


def _fits_classes(x: Tensor, *_: object) -> bool:
    return x.numel() == 0 or int(x.max()) < _MOST_REPEATS // x.numel()


def _fits_quotient(a: Tensor | float, b: Tensor | float, *_: object) -> bool:
    kind = torch.result_type(a, b)
    if kind.is_floating_point or kind.is_complex or kind in (torch.bool, torch.uint8):
        return True
    least = torch.iinfo(kind).min
    return not any(bool((torch.as_tensor(value).to(kind) == least).any()) for value in (a, b))


def _fits_lstm(x: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], *settings: int) -> bool:
    has_biases, layers, _, _, bidirectional, batch_first = settings
    hidden, cells = states[0].shape[-1], states[1].shape[-1]
    directions, batch = 1 + bidirectional, x.shape[0 if batch_first else 1]
    if layers * directions > len(params):
        return False
    expected: list[tuple[int, ...]] = []
    for layer in range(layers):
        width = hidden * directions if layer else x.shape[-1]
        biases = [(4 * cells,)] * 2 if has_biases else []
        projection = [(hidden, cells)] if hidden != cells else []
        expected += [(4 * cells, width), (4 * cells, hidden), *biases, *projection] * directions
    expected += [(layers * directions, batch, hidden), (layers * directions, batch, cells)]
    return [tuple(tensor.shape) for tensor in (*params, *states)] == expected


_CHECKS: Mapping[str, Callable[..., bool]] = {
    "scaled_dot_product_attention": lambda q, k, v, *_: (
        k.dim() > 1 and q.shape[-1:] == k.shape[-1:] and k.shape[-2:-1] == v.shape[-2:-1]
    ),
    "embedding_bag": _fits_bags,
    "_weight_norm": lambda v, g, dim=0: v.numel() > 0 and g.numel() == (v.shape[dim] if dim != -1 else 1),
    "_native_batch_norm_legit": lambda x, w, b, training, *_: training and _fits_batch_norm(x, w, b),
    "_native_batch_norm_legit_no_training": _fits_batch_norm,
    "lstm": _fits_lstm,
    "col2im": _fits_windows,
    "im2col": _fits_windows,
    **dict.fromkeys((f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)), _fits_windows),
    **dict.fromkeys(("_adaptive_avg_pool2d", "_adaptive_avg_pool3d"), _fits_bins),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d"), _fits_bins),
    "_pdist_forward": lambda x, _: x.dim() == 2 and x.numel() > 0,
    "one_hot": _fits_classes,
    "repeat_interleave.Tensor": _fits_repeats,
    "repeat_interleave.self_Tensor": _fits_repeats,
    "_fft_c2c": _fits_transform,
    "_fft_r2c": _fits_transform,
    "_fft_c2r": lambda x, dims, _, size: _fits_transform(x, dims) and 0 < size // 2 + 1 == x.shape[dims[-1]],
    **dict.fromkeys(("div.Tensor_mode", "div.Scalar_mode", "divide.Tensor_mode", "divide.Scalar_mode"), _fits_quotient),
    **dict.fromkeys(("floor_divide", "remainder", "fmod", "lcm", "gcd"), _fits_quotient),
}
_MOST_PADDING = 1 << 24
"""Far below numbers whose products overflow 32 bits."""
_READ_VALUES = (_fits_bags, _fits_classes, _fits_quotient, _fits_repeats)
_MOST_REPEATS = 1 << 40
"""Far below sums that overflow 64 bits, which the kernel does not check."""
