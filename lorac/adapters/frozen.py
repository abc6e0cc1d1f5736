"""A routed adapter whose router is frozen to one choice for all tokens: a mixture of LoRAs, which is a LoRA again."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorac.errors import AdapterError, ShapeMismatch
from lorac.variants._experts import Routes
from lorac.variants.adapter import Adapter
from lorac.variants.lora import LoRA

Tensor = torch.Tensor


def frozen(adapter: Adapter, weights: Sequence[float] | Tensor, name: str | None = None) -> Adapter:
    """The LoRA that a routed adapter is where its experts weigh the same for all tokens; it can be fused.

    Args:
        adapter: of a method that routes between LoRAs: X-LoRA, MeteoRA.
        weights: of the experts (experts,), at all sites; or (sites, experts), in the adapter's order: the mean of what
            the router gives over a prompt, say.
        name: the new adapter's name; default: the adapter's.

    Raises:
        AdapterError: its method routes between no LoRAs.
        ShapeMismatch: there are as many weights as neither experts nor sites.
    """
    variant = adapter.variant
    if not isinstance(variant, Routes):
        raise AdapterError(
            f"'{adapter.name}' is {variant.name}, which routes between no LoRAs",
            next_step="give an adapter of lorac.XLoRA or lorac.MeteoRA",
        )
    given = torch.as_tensor(weights).detach()
    if given.shape not in {(variant.experts,), (len(adapter.sites), variant.experts)}:
        raise ShapeMismatch(
            f"weights of shape {tuple(given.shape)} are not those of the {variant.experts} experts of '{adapter.name}'",
            next_step=f"give {variant.experts} numbers, or as many for each of its {len(adapter.sites)} sites",
        )
    rank = variant.experts * variant.r
    found = Adapter(name or adapter.name, LoRA(r=rank, alpha=rank, targets=adapter.sites))
    rows = given.expand(len(adapter.sites), -1)
    for (path, own), row in zip(adapter.tensors.items(), rows, strict=True):
        a, b = own["lora_A"].detach(), own["lora_B"].detach()
        scale = variant.expert_scale * row.to(b).repeat_interleave(variant.r)
        found.tensors[path] = {"lora_A": a.clone(), "lora_B": b * scale}
    return found
