"""A router frozen to constant weights, which turns a mixture of experts into a LoRA."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorac.adapters.fit import check_values
from lorac.adapters.lora_conversion import replace_by_lora
from lorac.argument_types import check_type
from lorac.errors import AdapterError, WrongType, missing_site_error, nearest_name, shape_error
from lorac.ir.algebra.reduction import Params
from lorac.variants._mixtures import RoutedVariant
from lorac.variants.adapter import Adapter

Weights = Sequence[float] | Tensor


@torch.no_grad()
def freeze_router(adapter: Adapter, weights: Weights | Mapping[str, Weights], *, name: str | None = None) -> Adapter:
    """Return the LoRA of a routed adapter with constant expert weights for all tokens: ΔW = s∘Σ_i w_i·B_i·A_i.

    It can be fused, baked, merged and saved like any LoRA. Experts of weight 0 are left out, so that a single expert
    becomes its LoRA.

    Args:
        adapter: an adapter of a method that routes between low-rank experts; it is only read.
        weights: the factor of each expert's output in the formula: (experts,) for all sites, (sites, experts) in the
            adapter's order, or site path -> (experts,). In FlyLoRA every rank is an expert.
        name: name of the result; default: the adapter's.

    Raises:
        AdapterError: the method has no experts, or the numbers of weights and experts differ.
        SiteError: weights are given for a site that the adapter does not touch, or are missing for a site that it
            touches.
        WrongType: ``adapter`` is not an adapter, or the weights are not numbers.
    """
    check_type(
        adapter, Adapter, "the adapter of lorac.freeze_router", next_step="give an adapter: compiled.adapters[name]"
    )
    check_values(adapter)
    tensors = {}
    rows = _weights_by_site(adapter, weights)
    for path, parameters in adapter.tensors.items():
        variant = adapter.variant.at_path(path)
        row = rows[path]
        if not isinstance(variant, RoutedVariant):
            raise AdapterError(
                f"'{adapter.name}' ({adapter.variant.name}) routes between no experts, so that there is nothing to "
                "freeze",
                next_step="give an adapter of a method that routes; lorac.to_lora makes a LoRA of one that edits "
                "weights",
            )
        if row.shape != (variant.routes,):
            raise shape_error(
                f"weights of shape {tuple(row.shape)} are given for the {variant.routes} experts at '{path}'",
                next_step=f"give {variant.routes} numbers for all sites, or as many for each of {len(adapter.tensors)} "
                "sites",
            )
        a, b = parameters["lora_A"].detach(), parameters["lora_B"].detach()
        scaled = row.to(b) * row.new_tensor(variant.scales).to(b) if variant.scales else row.to(b)
        each = scaled.repeat_interleave(a.shape[0] // variant.routes)
        scale = torch.as_tensor(variant.output_scale(Params(**parameters)), dtype=b.dtype).detach()
        weighted = each != 0
        if not weighted.any():
            weighted[0] = True
        a, b = a[weighted].clone(), (scale.unsqueeze(-1) * b * each)[:, weighted]
        tensors[path] = {"lora_A": a, "lora_B": b}
    return replace_by_lora(adapter, name, tensors)


def _weights_by_site(adapter: Adapter, weights: Weights | Mapping[str, Weights]) -> dict[str, Tensor]:
    """Return site path -> weights (experts,)."""
    paths = list(adapter.tensors)
    if isinstance(weights, Mapping):
        mismatched = sorted(weights.keys() ^ set(paths))
        if mismatched:
            problem = "no weights are given for" if mismatched[0] in paths else "weights are given for"
            raise missing_site_error(
                f"{problem} '{mismatched[0]}', and '{adapter.name}' touches {len(paths)} sites",
                nearest=None if mismatched[0] in paths else nearest_name(mismatched[0], paths),
                next_step="give weights for each of adapter.sites",
            )
        return {path: _read_weights(weights[path]) for path in paths}
    found = _read_weights(weights)
    return dict(
        zip(paths, found if found.dim() == 2 and len(found) == len(paths) else [found] * len(paths), strict=True)
    )


def _read_weights(weights: object) -> Tensor:
    try:
        found = torch.as_tensor(weights, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise WrongType(
            f"weights of experts are numbers, not {type(weights).__name__}", next_step="give one for each expert"
        ) from error
    if not found.isfinite().all():
        raise WrongType("weights of experts are finite numbers, and one of these is not", next_step="give others")
    return found
