"""Linear layers that round exactly as the model's do, although no weight of the copy needs a gradient.

torch multiplies a non-contiguous input by a matrix in one of two ways, which round differently: as one product over all
tokens if the weight needs a gradient, which makes the backward pass smaller, otherwise batch by batch. Only the
weight's ``requires_grad`` decides, not whether gradients are recorded, and the weights of the copy never need a
gradient.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def match_linear_rounding(host: nn.Module, copy: nn.Module) -> None:
    """Make the linear layers of ``copy`` multiply as those of ``host`` do, where the host's weights need gradients."""
    needing = {name for name, parameter in host.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    for path, module in copy.named_modules():
        plain = type(module).forward is nn.Linear.forward and "forward" not in vars(module)  # as accelerate's hooks set
        if plain and f"{path}.weight" in needing:
            module.forward = functools.partial(_forward, module)


def _forward(module: nn.Linear, input: Tensor) -> Tensor:
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
