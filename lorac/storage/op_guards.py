"""Checks before ops whose kernels do not check their operands: with wrong shapes or offsets they read beyond a tensor.

A captured program has no such calls; a file that somebody wrote may. Seen on the CPU with torch 2.13.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lorac.errors import ArtifactError


class GuardedOp:
    """An op that is called only with operands that its check accepts.

    Args:
        fits: returns whether the operands fit together.
    """

    def __init__(self, op: torch._ops.OpOverload, fits: Callable[..., bool]) -> None:
        self.op, self.fits = op, fits
        self.__name__, self.__module__ = f"guarded_{op._opname}", __name__

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Check the operands and call the op.

        Raises:
            ArtifactError: they do not fit together.
        """
        # While a program is exported its operands are symbolic, and nothing is computed.
        if not torch.compiler.is_compiling() and not self.fits(*args, **kwargs):
            raise ArtifactError(f"the program calls '{self.op}' with operands that do not fit together")
        return self.op(*args, **kwargs)


def guard_op(op: torch._ops.OpOverload) -> Callable[..., object]:
    """Return an op, guarded if its kernel believes its operands."""
    fits = _CHECKS.get(op._opname)
    return op if fits is None else GuardedOp(op, fits)


def _fits_attention(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> bool:
    return key.dim() > 1 and query.shape[-1:] == key.shape[-1:] and key.shape[-2:-1] == value.shape[-2:-1]


def _fits_bags(weight: Tensor, indices: Tensor, offsets: Tensor, *_: object, **__: object) -> bool:
    bounds = torch.cat((offsets.new_zeros(1), offsets, offsets.new_full((1,), indices.numel())))
    return offsets.dim() == 1 and bool((bounds.diff() >= 0).all())


def _fits_norm(v: Tensor, g: Tensor, dim: int = 0) -> bool:
    return g.numel() == (v.shape[dim] if dim != -1 else 1)


def _fits_batch_norm(x: Tensor, *parameters: object, **_: object) -> bool:
    return all(parameter.shape == x.shape[1:2] for parameter in parameters if isinstance(parameter, Tensor))


def _fits_lstm(x: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], *settings: int) -> bool:
    has_biases, layers, _, _, bidirectional, batch_first = settings
    hidden, cells = states[0].shape[-1], states[1].shape[-1]
    directions, batch = 1 + bidirectional, x.shape[0 if batch_first else 1]
    expected: list[tuple[int, ...]] = []
    for layer in range(layers):
        width = hidden * directions if layer else x.shape[-1]
        biases = [(4 * cells,)] * 2 if has_biases else []
        projection = [(hidden, cells)] if hidden != cells else []
        expected += [(4 * cells, width), (4 * cells, hidden), *biases, *projection] * directions
    expected += [(layers * directions, batch, hidden), (layers * directions, batch, cells)]
    return [tuple(tensor.shape) for tensor in (*params, *states)] == expected


_CHECKS: Mapping[str, Callable[..., bool]] = {
    "scaled_dot_product_attention": _fits_attention,
    "embedding_bag": _fits_bags,
    "_weight_norm": _fits_norm,
    "_native_batch_norm_legit": _fits_batch_norm,
    "_native_batch_norm_legit_no_training": _fits_batch_norm,
    "lstm": _fits_lstm,
}
