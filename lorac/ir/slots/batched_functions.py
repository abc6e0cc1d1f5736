"""Functions in forms that ``torch.vmap`` batches for symbolic sizes; torch's own forms specialise to example sizes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorac.ir.traces.modes import FunctionMode


class BatchedFunctions(FunctionMode):
    """A mode that replaces functions that ``torch.vmap`` cannot batch for symbolic sizes."""

    def handle(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        return _in_other_functions.get(function, function)(*args, **kwargs)


_in_other_functions: dict[object, Callable[..., object]] = {}


def _replaces(*functions: object) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Return a decorator that puts a function in the place of these."""

    def replace(function: Callable[..., object]) -> Callable[..., object]:
        _in_other_functions.update(dict.fromkeys(functions, function))
        return function

    return replace


@_replaces(F.linear)
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = F.linear(x, weight)
    return y if bias is None else y + bias


@_replaces(F.scaled_dot_product_attention)
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> Tensor:
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        queries, keys = (torch.arange(tensor.shape[-2], device=q.device) for tensor in (q, k))
        attn_mask = queries[:, None] >= keys
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return torch.softmax(scores, -1) @ v


@_replaces(F.layer_norm)
def _layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    axes = tuple(range(-len(normalized_shape), 0))
    centred = x - x.mean(axes, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@_replaces(torch.cat)
def _cat(tensors: list[Tensor] | tuple[Tensor, ...], dim: int = 0) -> Tensor:
    if any(tensor.shape != tensors[0].shape for tensor in tensors):
        return torch.cat(tensors, dim)
    axis = dim % tensors[0].dim()
    return torch.stack(tensors, axis).flatten(axis, axis + 1)


@_replaces(torch.gather, Tensor.gather)
def _gather(x: Tensor, dim: int, index: Tensor) -> Tensor:
    chosen = _choose(x, dim, index)
    return torch.where(chosen, x.unsqueeze(-2), torch.zeros((), dtype=x.dtype)).sum(-1)


@_replaces(torch.scatter, Tensor.scatter)
def _scatter(x: Tensor, dim: int, index: Tensor, value: float) -> Tensor:
    return torch.where(_choose(x, dim, index).any(-2), torch.full((), value, dtype=x.dtype), x)


def _choose(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """Return a mask (…, k, items) of the items on the last axis that an index (…, k) selects."""
    if dim % x.dim() != x.dim() - 1:
        raise RuntimeError("torch.vmap does not batch an index along another axis than the last")
    return index.unsqueeze(-1) == torch.arange(x.shape[-1], device=x.device)
