"""Pruning of a trained SoRA's closed gates, which leaves a LoRA with a rank of its own at each site.

Ding et al., EMNLP 2023, arXiv 2311.11696.
"""

from typing import cast

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
