"""How far two adapters keep out of each other's way: SHiRA's two measures of the orthogonality of their updates.

Bhardwaj et al. 2024, arXiv 2406.13175.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lorac.adapters.factors import iter_changes
from lorac.errors import AdapterError, SiteError
from lorac.frontend.model_view import ModelView
from lorac.ir.algebra.changes import merge_weight
from lorac.variants.adapter import Adapter

Tensor = torch.Tensor


@dataclass(frozen=True)
class Orthogonality:
    """The product A₁ᵀ·A₂ (in, in) of two updates of one weight (out, in), in two numbers.

    Attributes:
        magnitude: AWOM, its Frobenius norm; 0: they write to orthogonal outputs.
        ratio: AWOR, the share of its entries that are exactly 0; 1: orthogonal, 0: every entry meets.
    """

    magnitude: float
    ratio: float


def orthogonality(first: Tensor, second: Tensor) -> Orthogonality:
    """AWOM and AWOR of two updates, computed in float64. Source: SHiRA, arXiv 2406.13175.

    Args:
        first, second: updates ΔW (out, in) of one weight.

    Raises:
        AdapterError: they are no two matrices of one shape.
    """
    if first.ndim != 2 or first.shape != second.shape:
        raise AdapterError(
            f"updates of {list(first.shape)} and {list(second.shape)} are not of one weight",
            next_step="give two matrices (out, in)",
            code="shape_mismatch",
        )
    product = first.detach().double().t() @ second.detach().double()
    met = int(product.count_nonzero())
    return Orthogonality(float(torch.linalg.vector_norm(product)), 1 - met / product.numel())


def adapter_orthogonality(first: Adapter, second: Adapter, model: nn.Module) -> dict[str, Orthogonality]:
    """AWOM and AWOR of two adapters, at every site that both adapt.

    Args:
        first, second: adapters of any two methods that edit weights, or whose branches come to the same.
        model: the base; read only.

    Raises:
        CompileError: a method has no update of the weight.
        SiteError: no site is adapted by both.
    """
    common = [path for path in first.tensors if path in second.tensors]
    if not common:
        raise SiteError(
            f"'{first.name}' and '{second.name}' adapt no site in common",
            next_step="adapters that share no site are orthogonal as they are",
            code="site_not_found",
        )
    view = ModelView.of(model)
    updates = zip(*(iter_changes(common, adapter, view, torch.float64) for adapter in (first, second)), strict=True)
    found = {}
    for (path, one), (_, other) in updates:
        weight = view.base.weight(view.sites[path]).double()
        found[path] = orthogonality(merge_weight(one, weight) - weight, merge_weight(other, weight) - weight)
    return found
