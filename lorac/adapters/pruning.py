"""Pruning of a trained SoRA's closed gates, which leaves a LoRA with a rank of its own at each site.

Ding et al., EMNLP 2023, arXiv 2311.11696.
"""

from collections.abc import Mapping
from typing import cast

import torch

from lorac.adapters.lora_conversion import replace_by_lora
from lorac.errors import AdapterError, AdapterNotFound
from lorac.variants.adapter import Adapter
from lorac.variants.sora import SoRA


def prune_gates(adapter: Adapter, name: str | None = None) -> Adapter:
    """Return the LoRA of a SoRA adapter's open gates, exactly.

    A' = diag(g)·A (r', in) and B' (out, r') over the r' open gates. The scale stays alpha/r of the r that training
    began with, so that alpha' = alpha·r'/r. A site whose gates are all closed is left out.

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
    tensors = {
        path: _open_gates(parameters) for path, parameters in adapter.tensors.items() if parameters["gate"].any()
    }
    if not tensors:
        raise AdapterError(f"every gate of '{adapter.name}' is closed", next_step="train with a smaller threshold")
    initial = {path: cast(SoRA, variant.at_path(path)) for path in tensors}
    alphas = {path: initial[path].alpha * len(at["lora_A"]) / initial[path].r for path, at in tensors.items()}
    return replace_by_lora(adapter, name, tensors, alphas)


def _open_gates(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    gate = parameters["gate"].detach()
    open_ranks = gate.nonzero().flatten()
    lora_a, lora_b = parameters["lora_A"].detach(), parameters["lora_B"].detach()
    return {"lora_A": gate[open_ranks, None] * lora_a[open_ranks], "lora_B": lora_b[:, open_ranks].contiguous()}
