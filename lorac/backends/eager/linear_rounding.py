"""Products as the model computes them, to the last bit, though no weight of the copy needs a gradient.

torch multiplies an input that does not lie in one piece by a matrix in one of two ways, which round differently: as
one product over all tokens where the weight needs a gradient, so that the backward pass stays small, else batch by
batch. Whether a gradient is recorded makes no difference to it, and the weights of the copy never need one.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def match_linear_rounding(host: nn.Module, copy: nn.Module) -> None:
    """Make the linear layers of ``copy`` multiply as those of ``host`` do, whose weights may need gradients."""
    needing = {name for name, parameter in host.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    for path, module in copy.named_modules():
        plain = type(module).forward is nn.Linear.forward and "forward" not in vars(module)  # as accelerate's hooks set
        if plain and f"{path}.weight" in needing:
            module.forward = functools.partial(_forward, module)


def _forward(module: nn.Linear, input: Tensor) -> Tensor:
    weight, bias, strides = module.weight, module.bias, input.stride()
    # Whether all axes but the last can be folded into one by their strides; axes of size 1 have any stride.
    whole = input.is_contiguous() and (
        bias is not None or all([strides[i] == strides[i + 1] * input.shape[i + 1] for i in range(input.dim() - 2)])
    )
    if input.dim() <= 2 or whole or torch.is_autocast_enabled(input.device.type):
        return F.linear(input, weight, bias)
    # Its operands and their order are those of torch's own folding.
    product = torch.mm(input.reshape(-1, input.shape[-1]), weight.t()).view(*input.shape[:-1], weight.shape[0])
    return product if bias is None else product + bias
