"""Ties in ``topk``: torch does not say which of equal numbers it returns, and another program may return others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class FirstOfEqual(TorchDispatchMode):
    """Lets ``topk`` choose the first of equal numbers, as ONNX defines it."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an op."""
        if func is not torch.ops.aten.topk.default:
            return func(*args, **(kwargs or {}))
        return _topk(*args, **(kwargs or {}))


def _topk(values: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Tensor, Tensor]:
    found, places = values.sort(dim=dim, descending=largest, stable=True)
    return found.narrow(dim, 0, k), places.narrow(dim, 0, k)
