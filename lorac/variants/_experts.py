"""LoRAs as experts of a method that routes between them: their factors, side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from lorac.errors import AdapterError
from lorac.ir.sites import Site, SiteKind
from lorac.variants import _initialisers as _inits
from lorac.variants.adapter import Adapter
from lorac.variants.params import ParamSpec, Role

Factors = tuple[torch.Tensor, torch.Tensor]
"""A (r, in) and B (out, r) of one LoRA at one site, its scale folded into B."""


def expert_specs(site: Site, ranks: int, role: Role) -> dict[str, ParamSpec]:
    """The tensors of experts side by side: A (ranks, in) and B (out, ranks), ``ranks`` those of all experts."""
    return {
        "lora_A": ParamSpec((ranks, site.in_features), _inits.kaiming_uniform, role),
        "lora_B": ParamSpec((site.out_features, ranks), _inits.zeros, role),
    }


def read_factors(adapter: Adapter, method: str) -> dict[str, Factors]:
    """Site path -> the factors of a plain LoRA that a method is to route.

    Raises:
        AdapterError: it is more than its two factors.
    """
    if adapter.variant.name != "lora" or adapter.replaced:
        more = f"replaces {next(iter(adapter.replaced))}" if adapter.replaced else f"is {adapter.variant.name}"
        raise AdapterError(
            f"'{adapter.name}' {more}; {method} routes between plain LoRAs",
            next_step="give adapters of lorac.LoRA without modules_to_save",
        )
    found = {}
    for path, tensors in adapter.tensors.items():
        if tensors.keys() != {"lora_A", "lora_B"}:
            raise AdapterError(
                f"'{adapter.name}' at '{path}' holds {sorted(tensors)}; {method} routes A and B only",
                next_step="give adapters of lorac.LoRA without a bias",
            )
        a, b = tensors["lora_A"].detach(), tensors["lora_B"].detach()
        scale: float = adapter.variant.at(linear_site_of(path, a, b)).scale  # type: ignore[attr-defined]  # LoRA and its kin have a scale
        found[path] = (a, b * scale)
    return found


def linear_site_of(path: str, a: torch.Tensor, b: torch.Tensor) -> Site:
    """The linear layer that factors belong to, as far as they tell."""
    return Site(path, SiteKind.LINEAR, b.shape[0], a.shape[1], a.dtype, None)


def stack_factors(path: str, factors: Sequence[Factors | None], rank: int, method: str) -> Factors:
    """A (L·rank, in) and B (out, L·rank) of L experts at one site; smaller ranks are padded with zeros.

    Raises:
        AdapterError: two were made for different models.
    """
    present = [pair for pair in factors if pair is not None]
    shapes = {(b.shape[0], a.shape[1]) for a, b in present}
    if len(shapes) > 1:
        raise AdapterError(
            f"the LoRAs at '{path}' are for layers (out, in) of {' and '.join(map(str, sorted(shapes)))}",
            next_step=f"{method} takes LoRAs of one base model",
            code="shape_mismatch",
        )
    a, b = present[0]
    none = (a.new_zeros(0, a.shape[1]), b.new_zeros(b.shape[0], 0))
    pairs = [pair if pair is not None else none for pair in factors]
    down = torch.cat([F.pad(a, (0, 0, 0, rank - a.shape[0])) for a, _ in pairs])
    return down, torch.cat([F.pad(b, (0, rank - b.shape[1])) for _, b in pairs], dim=1)
