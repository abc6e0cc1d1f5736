"""A router frozen to one choice: what is left of it is a mixture, which is a LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lorac.adapters.fit import check_values
from lorac.adapters.lora_conversion import make_lora_variant
from lorac.argument_types import check_type
from lorac.errors import AdapterError, SiteError, WrongType, nearest_name
from lorac.ir.algebra.reduction import Params
from lorac.variants._mixtures import RoutedVariant
from lorac.variants.adapter import Adapter

Tensor = torch.Tensor
Weights = Sequence[float] | Tensor


@torch.no_grad()
def freeze_router(adapter: Adapter, weights: Weights | Mapping[str, Weights], *, name: str | None = None) -> Adapter:
    """The LoRA that a routed adapter is where all tokens weigh its experts alike: ΔW = s∘Σ_i w_i·B_i·A_i.

    It can be fused, baked, merged and saved as any LoRA. Experts of weight 0 are left out, so that of one expert alone
    its own LoRA is left.

    Args:
        adapter: of a method that routes between experts of low rank; only read.
        weights: what each expert's output is multiplied with, in the formula's own words: (experts,) for all sites,
            (sites, experts) in the adapter's order, or site path -> (experts,). Of FlyLoRA, every rank is one.
        name: of the result; default: the adapter's own.

    Raises:
        AdapterError: the method routes between no experts.
        AdapterError: there are other numbers of weights than of experts.
        SiteError: weights are given for a site that the adapter does not touch, or are missing for one.
        WrongType: it is no adapter, or its weights are no numbers.
    """
    check_type(
        adapter, Adapter, "what lorac.freeze_router freezes", next_step="give an adapter: compiled.adapters[name]"
    )
    check_values(adapter)
    ranks, tensors = {}, {}
    rows = _rows(adapter, weights)
    for path, held in adapter.tensors.items():
        variant = adapter.variant.at_path(path)
        a, b = _frozen(adapter, variant, path, held, rows[path])
        tensors[path], ranks[path] = {"lora_A": a, "lora_B": b}, a.shape[0]
    return Adapter(
        name or adapter.name, make_lora_variant(ranks, ranks, adapter.variant), tensors, dict(adapter.replaced)
    )


def _frozen(
    adapter: Adapter, variant: object, path: str, held: Mapping[str, Tensor], row: Tensor
) -> tuple[Tensor, Tensor]:
    """A (R, in) and B (out, R) of the experts that weigh something; of none, one of rank 1 that does nothing."""
    if not isinstance(variant, RoutedVariant):
        raise AdapterError(
            f"'{adapter.name}' ({adapter.variant.name}) routes between no experts, so that there is nothing to freeze",
            next_step="give an adapter of a method that routes; lorac.to_lora(adapter) makes a LoRA of some others",
        )
    if row.shape != (variant.routes,):
        raise AdapterError(
            f"weights of shape {tuple(row.shape)} are given for the {variant.routes} experts at '{path}'",
            next_step=f"give {variant.routes} numbers, for all sites or for each of {len(adapter.tensors)}",
            code="shape_mismatch",
        )
    a, b = held["lora_A"].detach(), held["lora_B"].detach()
    each = row.to(b).repeat_interleave(a.shape[0] // variant.routes)
    scale = torch.as_tensor(variant.output_scale(Params(**held)), dtype=b.dtype).detach()
    kept = each != 0
    if not kept.any():
        kept[0] = True
    return a[kept].clone(), (scale.unsqueeze(-1) * b * each)[:, kept]


def _rows(adapter: Adapter, weights: Weights | Mapping[str, Weights]) -> dict[str, Tensor]:
    """Site path -> weights (experts,)."""
    paths = list(adapter.tensors)
    if isinstance(weights, Mapping):
        unlike = sorted(weights.keys() ^ set(paths))
        if unlike:
            told = "no weights are given for" if unlike[0] in paths else "weights are given for"
            raise SiteError(
                f"{told} '{unlike[0]}', and '{adapter.name}' touches {len(paths)} sites",
                nearest=None if unlike[0] in paths else nearest_name(unlike[0], paths),
                next_step="give weights for each of adapter.sites",
                code="site_not_found",
            )
        return {path: _numbers(weights[path]) for path in paths}
    found = _numbers(weights)
    return dict(
        zip(paths, found if found.dim() == 2 and len(found) == len(paths) else [found] * len(paths), strict=True)
    )


def _numbers(weights: object) -> Tensor:
    try:
        found = torch.as_tensor(weights, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise WrongType(
            f"weights of experts are numbers, not {type(weights).__name__}", next_step="give one for each expert"
        ) from error
    if not found.isfinite().all():
        raise WrongType("weights of experts are finite numbers, and one of these is none", next_step="give others")
    return found
