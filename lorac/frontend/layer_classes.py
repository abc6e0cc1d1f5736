"""Layers of a class of its own: where in their ``forward`` the weight is, so that an adapter acts there and not behind.

A scaled embedding answers with a multiple of what ``nn.Embedding`` answers, and an adapter of its weight is scaled with
it, as it is once merged.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorac.frontend.site_discovery import is_gpt2_conv1d
from lorac.ir.sites import ConvGeometry

Forward = Callable[..., Any]
_LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def find_layer_class(module: nn.Module) -> Any:
    """The class of layer that a module is, whatever it adds."""
    known = _LAYERS if not is_gpt2_conv1d(module) else ()
    return next(cls for cls in type(module).__mro__ if cls in known or cls.__name__ == "Conv1D")


def has_plain_forward(module: Any) -> bool:
    """Whether a layer's forward is that of its layer class.

    One that calls no other ``forward`` counts as that where it answers the same, as Falcon's product without
    ``F.linear`` does.
    """
    cls, base = type(module), find_layer_class(module)
    return cls.forward is base.forward or (not calls_super_forward(module) and _answers_as(module, base))


def calls_super_forward(module: Any) -> bool:
    """Whether a layer's own forward calls ``super().forward``, by its code; what has none is taken to."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is None or "forward" in code.co_names


def replace_super_forward(module: nn.Module, forward: Forward) -> Any:
    """The module's class again, whose ``super().forward`` is ``forward(*args, **kwargs)``."""
    cls, base = type(module), find_layer_class(module)
    below = type(base.__name__, (base,), {"forward": lambda self, *args, **kwargs: forward(*args, **kwargs)})
    return type(cls.__name__, (cls, below), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def pad_conv_input(x: Tensor, conv: ConvGeometry | None) -> Tensor:
    """What a layer's product reads of its input: padded, where a convolution's op cannot pad as its module does."""
    if conv is None or not conv.before:
        return x
    return F.pad(x, conv.before, mode="constant" if conv.mode == "zeros" else conv.mode)


@torch.no_grad()
def _answers_as(module: Any, base: Any) -> bool:
    if base is not nn.Linear or module.weight.is_meta:
        return False
    drawn = torch.randn(3, module.in_features, generator=torch.Generator().manual_seed(0))
    x = drawn.to(module.weight)
    own, plain = type(module).forward(module, x), base.forward(module, x)
    return isinstance(own, torch.Tensor) and own.shape == plain.shape and torch.allclose(own, plain, rtol=1e-3)
