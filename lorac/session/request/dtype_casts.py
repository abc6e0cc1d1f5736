"""Casts that a model's forward makes itself, for a target that lacks the dtype."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_METHODS = {Tensor.bfloat16: torch.bfloat16, Tensor.half: torch.float16, Tensor.double: torch.float64}
"""Methods of tensors that cast -> their dtypes."""


def redirect_casts(model: nn.Module, dtypes: Mapping[torch.dtype, torch.dtype]) -> None:
    """Make a copy of a model cast to other dtypes than its forward says, by a subclass of its class.

    Args:
        model: the copy, whose weights are cast already.
        dtypes: dtype that a target lacks -> the dtype that it computes in.
    """
    cls = type(model)

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _RedirectedCasts(dtypes):
            return cls.forward(self, *args, **kwargs)

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    model.__class__ = type(cls.__name__, (cls,), {**names, "forward": forward})


class _RedirectedCasts(TorchFunctionMode):
    """Replaces dtypes among the arguments of torch's functions."""

    def __init__(self, dtypes: Mapping[torch.dtype, torch.dtype]) -> None:
        super().__init__()
        self._dtypes = dtypes

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's
        target = self._dtypes.get(_METHODS[func]) if func in _METHODS else None
        if target is not None:
            return args[0].to(target)
        return func(*map(self._replace, args), **{name: self._replace(v) for name, v in (kwargs or {}).items()})

    def _replace(self, value: object) -> object:
        return self._dtypes.get(value, value) if isinstance(value, torch.dtype) else value
