"""Other ranks of a trained LoRA: the nearest LoRA of lower rank in the Frobenius norm, which can be trained further.

Vulić et al. 2026, arXiv 2602.10993, in the form that never makes a matrix as large as the weight (Algorithm 2). A SoRA
without its closed gates is a LoRA: Ding et al., EMNLP 2023, arXiv 2311.11696.
"""

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lorac.adapters.lora_conversion import check_error, check_sizes, replace_by_lora
from lorac.adapters.truncation import compute_product_svd, find_rank, tail_errors
from lorac.errors import AdapterError, AdapterNotFound, OptionError
from lorac.variants.adapter import Adapter
from lorac.variants.adaptive_rank import SoRA
from lorac.variants.base import BranchVariant
from lorac.variants.lora import LoRA
from lorac.variants.low_rank import ScaledRank


@torch.no_grad()
def reduce_rank(
    adapter: Adapter, rank: int | None = None, *, energy: float | None = None, name: str | None = None, seed: int = 0
) -> Adapter:
    """Return the nearest LoRA of a lower rank, with Σ^½ in each factor and the same scale s (alpha' = s·r').

    The first r' components of ΔW = s·B·A = U·Σ·Vᵀ remain: B' = U·Σ^½/√s, A' = Σ^½·Vᵀ/√s. A component of size 0 gets a
    column of zeros in B' and a random row of length 1 in A', so that it can learn.

    Args:
        adapter: an adapter of method lora; its tensors are copied.
        rank: r'; sites of a lower rank keep their rank.
        energy: instead of ``rank``: each site's smallest rank with this share of Σσ², above 0, up to 1.
        name: name of the result; default: the adapter's.
        seed: seed of the random rows.

    Raises:
        AdapterError: the adapter is of another method.
        OptionError: neither or both of rank and energy are given, or one is out of range.
    """
    if (rank is None) == (energy is None):
        raise OptionError("exactly one of rank= and energy= is needed", next_step="give one of them")
    check_sizes(rank, None)
    if energy is not None and not 0 < energy <= 1:
        raise OptionError(f"energy={energy} is not a share of Σσ²", next_step="give a number above 0, up to 1")

    def choose(s: Tensor) -> int:
        if rank is not None:
            return min(rank, s.shape[-1])
        # The smallest rank with this share of Σσ²; for a stack, the largest of these ranks.
        shares = s.square().cumsum(-1) / s.square().sum(-1, keepdim=True).clamp_min(torch.finfo(s.dtype).tiny)
        return min(int((shares < (energy or 1.0)).sum(-1).max()) + 1, s.shape[-1])

    return _change_ranks(adapter, choose, name=name, seed=seed)


@torch.no_grad()
def resize(adapter: Adapter, rank: int | None = None, *, tolerance: float | None = None) -> Adapter:
    """Return a LoRA with another rank and the same scale: the nearest of a lower rank, or an equal one of higher rank.

    Σ^½ of the change's singular values goes to each factor. A rank above that of a change adds columns of zeros to B
    and random rows of length 1 to A, which training moves. Errors, ‖ΔW − ΔW'‖ / ‖ΔW‖, are recorded by site in the
    result's ``provenance["errors"]``.

    Args:
        adapter: an adapter of method lora; its tensors are copied.
        rank: the new rank at every site.
        tolerance: the largest error. Without ``rank`` each site has the smallest rank within the tolerance; with
            ``rank``, a site that exceeds the tolerance is refused.

    Raises:
        AdapterError: the adapter is of another method.
        OptionError: neither rank nor tolerance is given, or one is out of range.
        CompileError: an error exceeds ``tolerance`` at this rank.
    """
    if rank is None and tolerance is None:
        raise OptionError("a resize needs rank= or tolerance=", next_step="give one of them, or both")
    check_sizes(rank, tolerance)

    def choose(s: Tensor) -> int:
        return rank if rank is not None else find_rank(s, tolerance or 0.0)

    made = _change_ranks(adapter, choose)
    for path, error in made.provenance["errors"].items():
        if tolerance is not None:
            check_error(adapter.name, path, made.tensors[path]["lora_A"].shape[-2], error, tolerance)
    return made


def _change_ranks(
    adapter: Adapter, choose: Callable[[Tensor], int], *, name: str | None = None, seed: int = 0
) -> Adapter:
    """Return a LoRA whose rank at each site ``choose`` computes from the singular values (…, r)."""
    if not isinstance(adapter.variant, LoRA):
        raise AdapterError(
            f"'{adapter.name}' is {adapter.variant.name}, which is not LoRA",
            next_step=adapter.variant.instead or "use a method that edits weights; `lorac variants` lists them"
            if isinstance(adapter.variant, BranchVariant)
            else "lorac.to_lora(adapter, model, rank=…) makes a LoRA of it",
        )
    generator = torch.Generator().manual_seed(seed)
    tensors, alphas, errors = {}, {}, {}
    for path, parameters in adapter.tensors.items():
        variant = cast(ScaledRank, adapter.variant.at_path(path))
        u, s, vh = compute_product_svd(variant.scale * parameters["lora_B"].detach(), parameters["lora_A"].detach())
        width = choose(s)
        more = max(0, width - s.shape[-1])
        errors[path] = 0.0 if more else float(tail_errors(s)[width])
        u, s, vh = F.pad(u, (0, more)), F.pad(s, (0, more)), F.pad(vh, (0, 0, 0, more))
        u, s, vh = u[..., :width], s[..., :width], vh[..., :width, :]
        empty = (s <= s.shape[-1] * torch.finfo(s.dtype).eps * s.amax(-1, keepdim=True)).unsqueeze(-1)
        random = torch.randn(vh.shape, generator=generator).to(vh)
        random = random / torch.linalg.vector_norm(random, dim=-1, keepdim=True)
        root = (s / (abs(variant.scale) or 1.0)).sqrt()
        a = torch.where(empty, random, root.unsqueeze(-1) * vh).contiguous()
        b = torch.where(empty.mT, 0, math.copysign(1.0, variant.scale) * u * root.unsqueeze(-2)).contiguous()
        rest = {key: value.detach().clone() for key, value in parameters.items() if key not in {"lora_A", "lora_B"}}
        tensors[path] = {"lora_A": a.to(parameters["lora_A"].dtype), "lora_B": b.to(parameters["lora_B"].dtype), **rest}
        alphas[path] = variant.scale * width
    return replace_by_lora(adapter, name, tensors, alphas, {**adapter.base_facts, "errors": errors})


def prune_gates(adapter: Adapter, name: str | None = None) -> Adapter:
    """Return the LoRA of a SoRA adapter's open gates; the result is exact.

    A' = diag(g)·A (r', in) and B' (out, r') over the r' open gates. The scale stays alpha/r with the initial r, so that
    alpha' = alpha·r'/r. A site whose gates are all closed is left out.

    Args:
        adapter: an adapter of method sora; its tensors are copied.
        name: name of the result; default: the adapter's.

    Raises:
        AdapterNotFound: the adapter is of another method.
        AdapterError: all gates are closed.
    """
    variant = adapter.variant
    if not isinstance(variant, SoRA):
        raise AdapterNotFound(
            f"'{adapter.name}' is {variant.name}, which has no gates", next_step="give an adapter of method sora"
        )
    tensors = {}
    for path, parameters in adapter.tensors.items():
        gate, lora_a, lora_b = (parameters[name].detach() for name in ("gate", "lora_A", "lora_B"))
        if (kept := gate.nonzero().flatten()).numel():
            tensors[path] = {"lora_A": gate[kept, None] * lora_a[kept], "lora_B": lora_b[:, kept].contiguous()}
    if not tensors:
        raise AdapterError(f"every gate of '{adapter.name}' is closed", next_step="train with a smaller threshold")
    initial = {path: cast(SoRA, variant.at_path(path)) for path in tensors}
    alphas = {path: initial[path].alpha * len(at["lora_A"]) / initial[path].r for path, at in tensors.items()}
    return replace_by_lora(adapter, name, tensors, alphas)
