"""The orthogonality of two adapters' updates, by SHiRA's two measures.

Bhardwaj et al. 2024, arXiv 2406.13175.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorac.adapters.factors import iter_changes
from lorac.errors import AdapterError, SiteError
from lorac.frontend.model_view import ModelView
from lorac.ir.algebra.changes import merge_weight
from lorac.variants.adapter import Adapter


@dataclass(frozen=True)
class Orthogonality:
    """The product A₁ᵀ·A₂ (in, in) of two updates of one weight (out, in), in two numbers.

    Attributes:
        magnitude: AWOM, its Frobenius norm; 0 where the updates write to orthogonal outputs.
        ratio: AWOR, the share of its entries that are exactly 0; 1 where the updates are orthogonal.
    """

    magnitude: float
    ratio: float


def orthogonality(first: Tensor, second: Tensor) -> Orthogonality:
    """Return AWOM and AWOR of two updates, computed in float64. Source: SHiRA, arXiv 2406.13175.

    Args:
        first, second: updates ΔW (out, in) of one weight.

    Raises:
        AdapterError: the updates are not two matrices of one shape.
    """
    if first.ndim != 2 or first.shape != second.shape:
        raise AdapterError(
            f"updates of {list(first.shape)} and {list(second.shape)} do not belong to one weight",
            next_step="give two matrices (out, in)",
            code="shape_mismatch",
        )
    product = first.detach().double().t() @ second.detach().double()
    nonzero = int(product.count_nonzero())
    return Orthogonality(float(torch.linalg.vector_norm(product)), 1 - nonzero / product.numel())


def adapter_orthogonality(first: Adapter, second: Adapter, model: nn.Module) -> dict[str, Orthogonality]:
    """Return AWOM and AWOR of two adapters, at every site that both adapt.

    Args:
        first, second: adapters whose methods edit weights, or have branches that are equivalent to that.
        model: the base model, which stays unchanged.

    Raises:
        CompileError: a method has no update of the weight.
        SiteError: the adapters have no site in common.
    """
    common = [path for path in first.tensors if path in second.tensors]
    if not common:
        raise SiteError(
            f"'{first.name}' and '{second.name}' adapt no site in common",
            next_step="give two adapters that share a site; without one they are orthogonal",
            code="site_not_found",
        )
    view = ModelView.of(model)
    updates = zip(*(iter_changes(common, adapter, view, torch.float64) for adapter in (first, second)), strict=True)
    found = {}
    for (path, one), (_, other) in updates:
        weight = view.base.weight(view.sites[path]).double()
        found[path] = orthogonality(merge_weight(one, weight) - weight, merge_weight(other, weight) - weight)
    return found
