"""Adapters whose initial factors are subtracted from the base, and the rules that compute these factors from W.

A file that names one of these rules can be read with the base alone. PiSSA: Meng et al. 2024, arXiv 2404.02948; OLoRA:
Büyükakyüz 2024, arXiv 2406.01775.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from lorac.variants.adapter import Adapter
from lorac.variants.base import WeightVariant
from lorac.variants.low_rank import ScaledRank
from lorac.variants.residual import Residual

FactorPair = tuple[Tensor, Tensor]
"""A (r, in) and B (out, r)."""
FactorRule = Callable[[Tensor, int, float], FactorPair]
"""Function (W (out, in), r, scale s of the method) -> the factors of the product s·B·A that is subtracted."""


def balance_factors(u: Tensor, s: Tensor, vh: Tensor, scale: float) -> FactorPair:
    """Return factors with scale·B·A = u·diag(s)·vh; each gets the square root of the singular values."""
    root = (s / scale).sqrt()
    return root[..., :, None] * vh, u * root[..., None, :]


def pissa_factors(W: Tensor, r: int, scale: float) -> FactorPair:
    """Return PiSSA's factors: s·B·A is the best rank-r approximation of W."""
    u, s, vh = torch.linalg.svd(W, full_matrices=False)
    return balance_factors(u[..., :r], s[..., :r], vh[..., :r, :], scale)


def olora_factors(W: Tensor, r: int, scale: float) -> FactorPair:
    """Return OLoRA's factors: B is the first r columns of Q, and A the first r rows of R, with W = Q·R."""
    q, upper = torch.linalg.qr(W)
    return upper[..., :r, :].contiguous(), q[..., :r].contiguous()


FACTOR_RULES: Mapping[str, FactorRule] = {"olora": olora_factors, "pissa": pissa_factors}
"""The rules by their names in PEFT's ``init_lora_weights``."""


def subtract_factors(adapter: Adapter, starts: Mapping[str, FactorPair]) -> Adapter:
    """Return an adapter that subtracts s·B·A from the base at each of its sites; its tensors are shared, not copied.

    Args:
        adapter: an adapter of a method with a rank and a scale (LoRA, DoRA).
        starts: path of every site -> the pair.
    """
    variant = adapter.variant
    assert isinstance(variant, WeightVariant) and isinstance(variant, ScaledRank)
    scales = {path: cast(ScaledRank, variant.at_path(path)).scale for path in adapter.tensors}
    tensors = {
        path: parameters | {"start_A": a.contiguous().clone(), "start_B": scales[path] * b.contiguous()}
        for path, parameters in adapter.tensors.items()
        for a, b in (starts[path],)
    }
    return replace(adapter, variant=Residual.around(variant, variant.r, variant.rank_pattern), tensors=tensors)
