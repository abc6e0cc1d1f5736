"""torch's transformer layers, which in evaluation call one fused kernel with the weights of the layers inside them.

That kernel passes by the layers' own forwards, and an adapter there with them. So where a call touches a site inside
such a layer, its own Python runs; where it touches none, the layer does what the host's would, whose weights may need
gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_FUSED_LAYERS = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
TouchedSites = Callable[[], Collection[str]]


def disable_fast_path(host: nn.Module, copy: nn.Module, planned: Collection[str], touched: TouchedSites) -> None:
    """Have the transformer layers of ``copy`` call the layers inside them where it matters.

    Args:
        host: the model, whose parameters say whether they need gradients.
        copy: the copy of it that runs.
        planned: paths of the sites that adapters may touch.
        touched: () -> paths of those that the running call touches.
    """
    for path, module in copy.named_modules():
        if not isinstance(module, _FUSED_LAYERS):
            continue
        inside = frozenset(site for site in planned if site.startswith(f"{path}." if path else ""))
        needs = any(parameter.requires_grad for parameter in host.get_submodule(path).parameters())
        if inside or needs:
            layer: Any = module  # a module may be given a forward of its own
            layer.forward = functools.partial(_forward, layer.forward, inside, needs, touched)


def _forward(
    own: Callable[..., Any], inside: frozenset[str], needs: bool, touched: TouchedSites, *args: Any, **kwargs: Any
) -> Any:
    if inside.isdisjoint(touched()) and not (needs and torch.is_grad_enabled()):
        return own(*args, **kwargs)
    with _NoFastPath():
        return own(*args, **kwargs)


class _NoFastPath(TorchFunctionMode):
    """Does nothing; but torch fuses no layer whose calls somebody watches, in this thread alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))
