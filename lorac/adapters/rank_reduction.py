"""Reduction of a trained LoRA to a lower rank: the nearest one in the Frobenius norm, which can be trained further.

Vulić et al. 2026, arXiv 2602.10993, in the form that never makes a matrix as large as the weight (Algorithm 2).
"""

from __future__ import annotations

from typing import cast

import torch

from lorac.adapters.lora_conversion import compute_product_svd, make_lora_variant
from lorac.errors import AdapterNotFound, OptionError
from lorac.variants.adapter import Adapter
from lorac.variants.lora import LoRA
from lorac.variants.low_rank import ScaledRank

Tensor = torch.Tensor


@torch.no_grad()
def reduce_rank(
    adapter: Adapter, rank: int | None = None, *, energy: float | None = None, name: str | None = None, seed: int = 0
) -> Adapter:
    """Return the nearest LoRA of a lower rank, with Σ^½ in each factor and its present scale s (alpha' = s·r').

    Of ΔW = s·B·A = U·Σ·Vᵀ the first r' components remain: B' = U·Σ^½/√s, A' = Σ^½·Vᵀ/√s. A component of size 0 gets a
    column of zeros in B' and a random row of length 1 in A', so that it can learn.

    Args:
        adapter: of method lora; its tensors are copied.
        rank: r'; sites of a lower rank keep theirs.
        energy: instead of ``rank``: each site's smallest rank with this share of Σσ², above 0, up to 1.
        name: of the result; default: the adapter's own.
        seed: of the random rows.

    Raises:
        AdapterNotFound: the adapter is of another method.
        OptionError: neither or both of rank and energy are given, or one out of range.
    """
    if not isinstance(adapter.variant, LoRA):
        raise AdapterNotFound(
            f"'{adapter.name}' is {adapter.variant.name}, which is not LoRA",
            next_step="convert it with lorac.to_lora",
        )
    _check_sizes(rank, energy)
    generator = torch.Generator().manual_seed(seed)
    tensors, ranks, alphas = {}, {}, {}
    for path, parameters in adapter.tensors.items():
        variant = cast(ScaledRank, adapter.variant.at_path(path))
        u, s, vh = compute_product_svd(variant.scale * parameters["lora_B"].detach(), parameters["lora_A"].detach())
        width = min(rank, s.shape[-1]) if rank is not None else _rank_for_energy(s, energy or 1.0)
        b, a = _balanced_factors(u[..., :width], s[..., :width], vh[..., :width, :], variant.scale, generator)
        rest = {key: value.detach().clone() for key, value in parameters.items() if key not in {"lora_A", "lora_B"}}
        tensors[path] = {"lora_A": a.to(parameters["lora_A"].dtype), "lora_B": b.to(parameters["lora_B"].dtype), **rest}
        ranks[path], alphas[path] = width, variant.scale * width
    lora = make_lora_variant(ranks, alphas, adapter.variant, lora_bias=adapter.variant.lora_bias)
    return Adapter(name or adapter.name, lora, tensors, dict(adapter.replaced))


def _balanced_factors(
    u: Tensor, s: Tensor, vh: Tensor, scale: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return B' and A'."""
    root = (s / scale).sqrt()
    noise = s.shape[-1] * torch.finfo(s.dtype).eps * s.amax(-1, keepdim=True)
    empty = (s <= noise).unsqueeze(-1)
    random = torch.randn(vh.shape, generator=generator).to(vh)
    random = random / torch.linalg.vector_norm(random, dim=-1, keepdim=True)
    a = torch.where(empty, random, root.unsqueeze(-1) * vh)
    return torch.where(empty.mT, 0, u * root.unsqueeze(-2)).contiguous(), a.contiguous()


def _rank_for_energy(s: Tensor, energy: float) -> int:
    """Return the smallest rank with a share of Σσ², the largest over a stack."""
    shares = s.square().cumsum(-1) / s.square().sum(-1, keepdim=True).clamp_min(torch.finfo(s.dtype).tiny)
    return min(int((shares < energy).sum(-1).max()) + 1, s.shape[-1])


def _check_sizes(rank: int | None, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        raise OptionError("exactly one of rank= and energy= is needed", next_step="give one of them")
    if rank is not None and rank < 1:
        raise OptionError(f"a LoRA of rank {rank} does nothing", next_step="give rank= a whole number above 0")
    if energy is not None and not 0 < energy <= 1:
        raise OptionError(f"energy={energy} is not a share of Σσ²", next_step="give a number above 0, up to 1")
