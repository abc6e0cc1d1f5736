"""A trained SoRA without its closed gates: a LoRA whose rank each site has for itself.

Ding et al., EMNLP 2023, arXiv 2311.11696.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lorac.adapters.lora_conversion import make_lora_variant
from lorac.errors import AdapterError, AdapterNotFound
from lorac.variants.adapter import Adapter
from lorac.variants.sora import SoRA


def prune_gates(adapter: Adapter, name: str | None = None) -> Adapter:
    """The LoRA of a SoRA adapter's open gates, exactly: A' = diag(g)·A (r', in) and B' (out, r') over the r' of them.

    The scale stays alpha/r of the r that training began with, so that alpha' = alpha·r'/r. A site whose gates are all
    closed is left out.

    Args:
        adapter: of method sora; its tensors are copied.
        name: of the result; default: the adapter's own.

    Raises:
        AdapterNotFound: the adapter is of another method.
        AdapterError: all its gates are closed.
    """
    variant = adapter.variant
    if not isinstance(variant, SoRA):
        raise AdapterNotFound(
            f"'{adapter.name}' is {variant.name}, which has no gates", next_step="give an adapter of method sora"
        )
    tensors = {path: _open(own) for path, own in adapter.tensors.items() if own["gate"].any()}
    if not tensors:
        raise AdapterError(f"every gate of '{adapter.name}' is closed", next_step="train with a smaller threshold")
    ranks = {path: len(own["lora_A"]) for path, own in tensors.items()}
    begun: dict[str, Any] = {path: variant.at_path(path) for path in tensors}
    alphas = {path: begun[path].alpha * rank / begun[path].r for path, rank in ranks.items()}
    lora = make_lora_variant(ranks, alphas, variant)
    return Adapter(name or adapter.name, lora, tensors, dict(adapter.replaced))


def _open(own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    gate = own["gate"].detach()
    left = gate.nonzero().flatten()
    lora_a, lora_b = own["lora_A"].detach(), own["lora_B"].detach()
    return {"lora_A": gate[left, None] * lora_a[left], "lora_B": lora_b[:, left].contiguous()}
