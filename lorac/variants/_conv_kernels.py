"""Kernels of convolutions: in groups, and in factors (out, r), (r, r, taps), (r, in), taps the number of its pixels.

FedPara's proposition 3, arXiv 2108.06098; as in LyCORIS, arXiv 2309.14859, and PEFT's use_effective_conv2d.
"""

from __future__ import annotations

import math

import torch

from lorac.errors import SiteError
from lorac.ir.sites import Site
from lorac.variants.params import InitContext


def kernel_columns(site: Site) -> tuple[int, int]:
    """Columns of what a kernel holds, as (input channels of a group, taps); (in, 1) of what is no convolution."""
    if site.conv is None:
        return site.in_features, 1
    return site.conv.channels // site.conv.groups, math.prod(site.conv.kernel)


def require_one_group(method: str, site: Site) -> None:
    """Raise ``SiteError`` at a convolution of several groups, for a method whose W' leaves their blocks."""
    if site.conv is not None and site.conv.groups > 1:
        raise SiteError(
            f"{method} makes one full matrix; '{site.path}' is a convolution of {site.conv.groups} groups",
            next_step="exclude= the module",
            code="site_unsupported",
        )


def expand_groups(kernel: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """The rows (out, in/groups·taps) that a kernel holds where W (out, in·taps) has them: its groups' blocks."""
    groups = W.shape[1] // kernel.shape[1]
    if groups == 1:
        return kernel
    blocks: torch.Tensor = torch.block_diag(*kernel.chunk(groups))
    return blocks


def tucker_kernel(core: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``[p, q·taps] = Σ_ij core[i, j, taps]·a[i, p]·b[j, q]``, a flat kernel of rank r."""
    inner = torch.einsum("ijt,jq->iqt", core, b).flatten(1)
    return a.t() @ inner


def uniform_core(context: InitContext) -> torch.Tensor:
    """kaiming_uniform with a = √5 of a core (r, r, taps), as of a kernel: fan_in = r·taps."""
    bound = 1 / math.sqrt(math.prod(context.shape[1:]))
    return torch.empty(context.shape).uniform_(-bound, bound, generator=context.generator)
