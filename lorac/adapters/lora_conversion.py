"""Conversion of adapters of other methods to LoRA, for files and programs that support only LoRA."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from lorac.adapters.factors import factors, iter_changes
from lorac.adapters.truncation import Truncation, truncate_matrix, truncate_product
from lorac.errors import OptionError, require_base, unmergeable_error
from lorac.frontend.model_view import Model, ModelView
from lorac.ir.algebra.changes import Change, Delta, LowRank, factors_of, merge_weight
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant, invocation_of
from lorac.variants.lora import LoRA

T = TypeVar("T")


@torch.no_grad()
def to_lora(
    adapter: Adapter,
    model: Model | None = None,
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    name: str | None = None,
) -> Adapter:
    """Convert an adapter to the LoRA with the same change at strength 1: exactly, or the nearest that a rank allows.

    The LoRA has scale 1 at every site, and at each site the smallest rank that is exact, or whose error is within a
    bound. Errors are ‖ΔW − B·A‖ / ‖ΔW‖ in the Frobenius norm, with ΔW = W' − W. The error of each site is recorded in
    the result's ``provenance["errors"]``, which lorac's format stores. A change of the bias becomes ``lora_bias``;
    replaced tensors stay replaced.

    Args:
        adapter: an adapter of a method that edits weights; it is only read.
        model: the base, or several by name; needed if ``lorac.factors`` needs it, and for the nearest LoRA of a change
            that scales, rotates or replaces the weight.
        rank: the largest rank; the error is then the smallest at this rank.
        tolerance: the largest error. Without ``rank`` each site has the smallest rank within the tolerance; with
            ``rank``, a site that exceeds the tolerance is refused.
        name: name of the result; default: the adapter's.

    Raises:
        OptionError: ``rank`` is below 1, or ``tolerance`` is not a number from 0 to 1.
        CompileError: no LoRA has the same change, and neither rank nor tolerance is given; or an error exceeds the
            tolerance.
        BaseNeeded, SiteError, AdapterError: as ``lorac.factors``.
    """
    check_sizes(rank, tolerance)
    edits, view = replace(adapter, replaced={}), None if model is None else ModelView.of(model)
    changes: Iterable[tuple[str, Change]] = factors(edits).items() if view is None else iter_changes(None, edits, view)
    found: dict[str, Truncation] = {}
    shifts: dict[str, Tensor] = {}
    for path, change in changes:
        if rank is None and tolerance is None and factors_of(change) is None:
            what = "is not low-rank" if not isinstance(change, LowRank) else "scales or turns the weight itself"
            raise unmergeable_error(
                f"the change of '{path}' by '{adapter.name}' ({adapter.variant.name}) {what}, so no LoRA equals it",
                next_step="give rank= for the nearest LoRA of a rank, or tolerance= for the smallest within an error",
            )
        found[path] = truncate_change(path, change, view, rank, tolerance or 0.0)
        if rank is not None and tolerance is not None:
            check_error(adapter.name, path, found[path].rank, found[path].error, tolerance)
        if change.e is not None and bool(change.e.any()):
            shifts[path] = change.e.clone()
    tensors = {path: {"lora_A": cut.a.contiguous(), "lora_B": cut.b.contiguous()} for path, cut in found.items()}
    for path, cut in found.items() if shifts else ():
        tensors[path]["lora_bias"] = shifts.get(path, cut.b.new_zeros(cut.b.shape[-2]))
    provenance = {**adapter.base_facts, "errors": {path: cut.error for path, cut in found.items()}}
    return replace_by_lora(adapter, name, tensors, provenance=provenance)


def replace_by_lora(
    adapter: Adapter,
    name: str | None,
    tensors: dict[str, dict[str, Tensor]],
    alphas: Mapping[str, float] | None = None,
    provenance: Mapping[str, object] | None = None,
) -> Adapter:
    """Make a LoRA from another adapter: only the method and the tensors of sites are new.

    Args:
        name: name of the result; None: the other adapter's.
        tensors: path of a site -> A (r, in), B (out, r), and ``lora_bias`` at all sites or none.
        alphas: path of a site -> alpha; None: the ranks, which make the scale 1.
    """
    ranks = {path: at_site["lora_A"].shape[-2] for path, at_site in tensors.items()}
    biased = any("lora_bias" in at_site for at_site in tensors.values())
    variant = make_lora_variant(ranks, alphas or ranks, adapter.variant, lora_bias=biased)
    return Adapter(name or adapter.name, variant, tensors, dict(adapter.replaced), dict(provenance or {}))


def make_lora_variant(ranks: Mapping[str, int], alphas: Mapping[str, float], like: Variant, **fields: Any) -> LoRA:
    """Return a LoRA method with these ranks and alphas by site; all other fields are copied from another method."""
    widest = max(ranks, key=lambda path: ranks[path])
    return LoRA(
        r=ranks[widest],
        alpha=alphas[widest],
        dropout=getattr(like, "dropout", 0.0),
        rank_pattern=_differing_patterns(ranks, widest),
        alpha_pattern=_differing_patterns(alphas, widest),
        targets=tuple(ranks),
        parameters=like.parameters,
        modules_to_save=like.modules_to_save,
        invocation_tokens=invocation_of(like),
        bias="lora_only" if like.bias.endswith("_only") else like.bias,
        **fields,
    )


def check_sizes(rank: int | None, tolerance: float | None) -> None:
    """Refuse a rank below 1, and a tolerance outside 0 to 1.

    Raises:
        OptionError: rank or tolerance is out of range.
    """
    if rank is not None and rank < 1:
        raise OptionError(f"a LoRA of rank {rank} does nothing", next_step="give rank= a whole number above 0")
    if tolerance is not None and not 0 <= tolerance <= 1:
        raise OptionError(
            f"tolerance={tolerance} is out of range",
            next_step="give a number from 0 to 1, such as 0.1",
        )


def check_error(name: str, path: str, rank: int, error: float, tolerance: float) -> None:
    """Refuse a truncation whose error exceeds a tolerance.

    Raises:
        CompileError: the error exceeds the tolerance; the message names the site and the error.
    """
    if error > tolerance:
        raise unmergeable_error(
            f"the nearest LoRA of rank {rank} leaves out {error:.3g} of the change of '{path}' by '{name}', more than "
            f"tolerance={tolerance:g}",
            next_step="give a larger rank= or tolerance=, or tolerance= alone, which finds the ranks",
        )


def truncate_change(
    path: str, change: Change, view: ModelView | None, rank: int | None, tolerance: float
) -> Truncation:
    """Return the nearest pair to a site's change W' − W, of the smallest rank with an error within a tolerance.

    Args:
        path: the site's path.
        change: the change of its weight; a pair is decomposed without a product as large as W.
        view: the base; None if unknown.
        rank: the largest rank; None: any.
        tolerance: the largest error, unless the rank is reached.

    Raises:
        BaseNeeded: the change depends on the base, which is unknown.
    """
    if (pair := factors_of(change)) is not None:
        return truncate_product(*pair, rank, tolerance)
    if isinstance(change, Delta):
        return truncate_matrix(change.delta, rank, tolerance)
    view = require_base(
        view,
        f"the change of the weight of '{path}' depends on the base",
        next_step="pass model=, the base that the adapter was trained on",
    )
    return truncate_matrix(compute_delta(change, view.base.weight(view.sites[path])), rank, tolerance)


def compute_delta(change: Change, weight: Tensor) -> Tensor:
    """Return W' − W (out, in) in float32 or a wider dtype."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return change.delta.to(wide) if isinstance(change, Delta) else merge_weight(change, wide) - wide


def _differing_patterns(values: Mapping[str, T], path: str) -> dict[str, T]:
    """Return the values that differ from the value at ``path``, by patterns that match one whole path each."""
    return {f"^{re.escape(key)}": value for key, value in values.items() if value != values[path]}
