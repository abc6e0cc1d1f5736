"""Shapes of layers: hyper-parameters that do not fit them, and convolution kernels.

Kernels are grouped or factorized: (out, r), (r, r, taps), (r, in), where taps is the kernel's size; FedPara's
proposition 3, arXiv 2108.06098; as in LyCORIS, arXiv 2309.14859, and PEFT's use_effective_conv2d.
"""

import math

import torch

from lorac.errors import SiteError
from lorac.variants.base import InitContext, Site, Tensor
from lorac.variants.initialisers import uniform


def kernel_columns(site: Site) -> tuple[int, int]:
    """Return a kernel's columns as (input channels per group, taps); (in, 1) for sites that are not convolutions."""
    if site.conv is None:
        return site.in_features, 1
    return site.conv.channels // site.conv.groups, math.prod(site.conv.kernel)


def require_one_group(method: str, site: Site) -> None:
    """Raise ``SiteError`` at a grouped convolution, for methods whose W' is not block-diagonal."""
    if site.conv is not None and site.conv.groups > 1:
        raise SiteError(
            f"{method} makes one full matrix; '{site.path}' is a convolution of {site.conv.groups} groups",
            next_step="add the module to exclude=",
        )


def expand_groups(kernel: Tensor, W: Tensor) -> Tensor:
    """Place the groups of a kernel (out, in/groups·taps) on the diagonal blocks of a matrix like W (out, in·taps)."""
    groups = W.shape[1] // kernel.shape[1]
    if groups == 1:
        return kernel
    blocks: Tensor = torch.block_diag(*kernel.chunk(groups))
    return blocks


def multiply_factors(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """Return ``a·b``; with a core the flat kernel ``[p, q·taps] = Σ_ij core[i, j, taps]·a[i, p]·b[j, q]`` of rank r."""
    return a @ b if core is None else a.t() @ torch.einsum("ijt,jq->iqt", core, b).flatten(1)


def uniform_core(context: InitContext) -> Tensor:
    """Draw a core (r, r, taps) as a kernel: kaiming_uniform with a = √5 and fan_in = r·taps."""
    return uniform(1 / math.sqrt(math.prod(context.shape[1:])))(context)


def require_divisor(site: Site, field: str, size: int, *, outputs: bool = False) -> None:
    """Raise ``SiteError`` if a hyper-parameter does not divide a layer's inputs and outputs, or only its outputs."""
    common = site.out_features if outputs else math.gcd(site.in_features, site.out_features)
    if common % size:
        sides = "the outputs" if outputs else "both sides"
        raise SiteError(
            f"{field}={size} does not divide {sides} of '{site.path}', {site.in_features} -> {site.out_features}",
            nearest=f"{field}={max(d for d in range(1, min(size, common) + 1) if common % d == 0)}",
            next_step=f"give another {field}, or add the module to exclude=",
        )


def require_at_most(site: Site, field: str, size: int, most: int) -> None:
    """Raise ``SiteError`` if a hyper-parameter is larger than a layer admits."""
    if size > most:
        raise SiteError(
            f"'{site.path}', {site.in_features} -> {site.out_features}, takes {field} up to {most}, not {size}",
            nearest=f"{field}={most}",
            next_step=f"give a smaller {field}, or add the module to exclude=",
        )
