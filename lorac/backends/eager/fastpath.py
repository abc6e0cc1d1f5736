"""torch's transformer layers, which in evaluation call one fused kernel on the weights of their inner layers.

The kernel bypasses the inner layers' forwards, and therefore their adapters. So if a call touches a site inside such a
layer, or records gradients through its inputs, the layer's Python code runs. Otherwise the layer computes as the host's
does, whose weights may need gradients.
"""

import functools
from collections.abc import Callable, Collection
from typing import TypeVar

import torch
from torch import Tensor, nn

from lorac.frontend.fast_path import FUSED_LAYERS, NoFastPath, find_unfused_forward

TouchedSites = Callable[[], Collection[str]]
T = TypeVar("T")


def disable_fast_path(host: nn.Module, copy: nn.Module, planned: Collection[str], touched: TouchedSites) -> None:
    """Disable the fused fast path of transformer layers where it would bypass adapted inner layers.

    Args:
        host: the model; its parameters determine whether weights need gradients.
        copy: the running copy of the model.
        planned: paths of the sites that adapters may touch.
        touched: () -> paths of the sites that the running call adapts.
    """
    for path, module in copy.named_modules():
        if not isinstance(module, FUSED_LAYERS):
            continue
        inside = frozenset(site for site in planned if site.startswith(f"{path}." if path else ""))
        needs_grad = any(parameter.requires_grad for parameter in host.get_submodule(path).parameters())
        layer: nn.Module = module
        forwards = layer.forward, find_unfused_forward(layer)
        layer.forward = functools.partial(_forward, *forwards, inside, needs_grad, touched)


def _forward(
    forward: Callable[..., T],
    unfused: Callable[..., T],
    inside: frozenset[str],
    needs_grad: bool,
    touched: TouchedSites,
    *args: object,
    **kwargs: object,
) -> T:
    acting, records = touched(), torch.is_grad_enabled()
    through = records and any(isinstance(x, Tensor) and x.requires_grad for x in (*args, *kwargs.values()))
    if records and needs_grad:
        with NoFastPath():
            return forward(*args, **kwargs)
    if not acting or (inside.isdisjoint(acting) and not through):
        return forward(*args, **kwargs)
    with NoFastPath():
        return unfused(*args, **kwargs)
