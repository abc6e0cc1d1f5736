"""Layers of a model's copy that compute as the host's do, whose weights may need gradients.

torch's transformer layers in evaluation call one fused kernel on the weights of their inner layers. The kernel bypasses
the inner layers' forwards, and therefore their adapters. So if a call touches a site inside such a layer, or records
gradients through its inputs, the layer's Python code runs.

torch multiplies a non-contiguous input by a matrix in one of two ways, which round differently: as one product over all
tokens if the weight needs a gradient, which makes the backward pass smaller, otherwise batch by batch. Only the
weight's ``requires_grad`` decides, not whether gradients are recorded, and the weights of the copy never need a
gradient.
"""

import functools
from collections.abc import Callable, Collection
from typing import TypeVar

import torch
import torch.nn.functional as F
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

    def run(
        forward: Callable[..., T],
        unfused: Callable[..., T],
        inside: frozenset[str],
        needs_grad: bool,
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

    for path, module in copy.named_modules():
        if not isinstance(module, FUSED_LAYERS):
            continue
        inside = frozenset(site for site in planned if site.startswith(f"{path}." if path else ""))
        needs_grad = any(parameter.requires_grad for parameter in host.get_submodule(path).parameters())
        layer: nn.Module = module
        forwards = layer.forward, find_unfused_forward(layer)
        layer.forward = functools.partial(run, *forwards, inside, needs_grad)


def match_linear_rounding(host: nn.Module, copy: nn.Module) -> None:
    """Make the linear layers of ``copy`` multiply as those of ``host`` do, where the host's weights need gradients."""

    def forward(module: nn.Linear, input: Tensor) -> Tensor:
        weight, bias, strides = module.weight, module.bias, input.stride()
        # Whether strides allow folding all axes except the last into one; axes of size 1 may have any stride.
        whole = input.is_contiguous() and (
            bias is not None or all([strides[i] == strides[i + 1] * input.shape[i + 1] for i in range(input.dim() - 2)])
        )
        if input.dim() <= 2 or whole or torch.is_autocast_enabled(input.device.type):
            return F.linear(input, weight, bias)
        # Operands and their order are the same as in torch's own folding.
        product = torch.mm(input.reshape(-1, input.shape[-1]), weight.t()).view(*input.shape[:-1], weight.shape[0])
        return product if bias is None else product + bias

    needing = {name for name, parameter in host.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    for path, module in copy.named_modules():
        plain = type(module).forward is nn.Linear.forward and "forward" not in vars(module)  # as accelerate's hooks set
        if plain and f"{path}.weight" in needing:
            module.forward = functools.partial(forward, module)
