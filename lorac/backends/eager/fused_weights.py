"""Fused mode in eager: adapted weights have memory of their own, to which a swap writes."""

import torch
from torch import nn

from lorac.frontend.base_weights import read_stored_tensor
from lorac.ir.algebra import operands
from lorac.ir.sites.site import BaseReader, Site
from lorac.ir.slots.buffers import FusedBuffer
from lorac.ir.slots.plans import SitePlan


@torch.inference_mode(False)  # tensors allocated in inference mode cannot be written outside of it
def allocate_buffer(owner: nn.Module, plan: SitePlan, base: BaseReader) -> FusedBuffer:
    """Replace a module's weight by a parameter of its own, which starts with the base's values."""
    site = plan.site
    assert site.weight is not None
    leaf = site.weight.rpartition(".")[2]
    weight = read_stored_tensor(owner, leaf).detach().clone()
    if site.buffer:
        owner._buffers[leaf] = weight
    else:
        owner._parameters[leaf] = nn.Parameter(weight, requires_grad=False)
    bias = None
    if operands.BIAS in plan.room:
        original = base.bias(site)
        start = torch.zeros(site.out_features, dtype=weight.dtype) if original is None else original.clone()
        bias = nn.Parameter(start, requires_grad=False)
        if not adds_bias(owner, site):
            owner._parameters[_bias_name(site)] = bias
    return FusedBuffer(
        site,
        weight,
        site.present,
        lambda: base.weight(site),
        None if bias is None else bias.detach(),
        base.bias(site),
    )


def adds_bias(module: nn.Module, site: Site) -> bool:
    """Return whether a bias must be added to a module's output, since its forward adds none, as in an embedding."""
    return _bias_name(site) not in module._parameters


def _bias_name(site: Site) -> str:
    """Return the name of the bias in the module that owns the weight."""
    return "bias" if site.bias is None else site.bias.rpartition(".")[2]
