"""Conversion of adapters of other methods to LoRA, for files and programs that support nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch

from lorac.adapters.factors import factors, iter_changes
from lorac.errors import BaseNeeded, CompileError, OptionError
from lorac.frontend.model_view import Model, ModelView
from lorac.ir.algebra.changes import Change, LowRank, merge_weight
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant
from lorac.variants.lora import LoRA

Tensor = torch.Tensor
T = TypeVar("T")
FactorPair = tuple[Tensor, Tensor]
"""A (r, in) and B (out, r)."""


@torch.no_grad()
def to_lora(
    adapter: Adapter, model: Model | None = None, *, rank: int | None = None, name: str | None = None
) -> Adapter:
    """Convert an adapter to the LoRA with the same change at strength 1: exactly, or as nearly as a rank allows.

    Its scale is 1 everywhere, its rank at each site that of the change there. A change of the bias becomes
    ``lora_bias``; replaced tensors stay replaced.

    Args:
        adapter: of a method that edits weights; only read.
        model: the base, or several by name, needed where ``lorac.factors`` needs it, and for the nearest LoRA of a
            change without factors.
        rank: None: exactly. Else the largest rank; the error in W' − W is then as small as it can be in the Frobenius
            norm.
        name: of the result; default: the adapter's edits.

    Raises:
        OptionError: ``rank`` is below 1.
        CompileError: no LoRA has the same change, and no rank is given.
        BaseNeeded, SiteError, AdapterError: as ``lorac.factors``.
    """
    if rank is not None and rank < 1:
        raise OptionError(f"a LoRA of rank {rank} does nothing", next_step="give rank= a whole number above 0")
    edits, view = replace(adapter, replaced={}), None if model is None else ModelView.of(model)
    changes: Iterable[tuple[str, Change]] = factors(edits).items() if view is None else iter_changes(None, edits, view)
    pairs: dict[str, FactorPair] = {}
    shifts: dict[str, Tensor] = {}
    for path, change in changes:
        pairs[path] = (
            _exact_factors(adapter, path, change) if rank is None else _nearest_factors(path, change, view, rank)
        )
        if change.e is not None:
            shifts[path] = change.e.clone()
    tensors = {path: {"lora_A": a.contiguous(), "lora_B": b.contiguous()} for path, (a, b) in pairs.items()}
    for path, (_, b) in pairs.items() if shifts else ():
        tensors[path]["lora_bias"] = shifts.get(path, b.new_zeros(b.shape[-2]))
    ranks = {path: a.shape[-2] for path, (a, _) in pairs.items()}
    variant = make_lora_variant(ranks, ranks, adapter.variant, lora_bias=bool(shifts))
    return Adapter(name or adapter.name, variant, tensors, dict(adapter.replaced))


def make_lora_variant(ranks: Mapping[str, int], alphas: Mapping[str, float], like: Variant, **fields: Any) -> LoRA:
    """Return a LoRA with its rank and alpha at each of some sites, and all other fields as another method has them."""
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
        bias="lora_only" if like.bias.endswith("_only") else like.bias,
        **fields,
    )


def _exact_factors(adapter: Adapter, path: str, change: Change) -> FactorPair:
    if not isinstance(change, LowRank) or change.folded().scales:
        what = "is not low-rank" if not isinstance(change, LowRank) else "scales or turns the weight itself"
        raise CompileError(
            f"what '{adapter.name}' ({adapter.variant.name}) does to '{path}' {what}, so that no LoRA is the same",
            next_step="rank= makes the nearest LoRA of a rank",
            code="not_mergeable",
        )
    folded = change.folded()
    a, b = folded.a.mT, folded.b.mT
    return (a, b) if folded.rank else (a.new_zeros(*a.shape[:-2], 1, a.shape[-1]), b.new_zeros(*b.shape[:-1], 1))


def _nearest_factors(path: str, change: Change, view: ModelView | None, rank: int) -> FactorPair:
    """Return the first components of W' − W by their size; factors are decomposed without a product as large as W."""
    if isinstance(change, LowRank) and not change.folded().scales:
        folded = change.folded()
        u, s, vh = compute_product_svd(folded.b.mT, folded.a.mT)
    elif view is None:
        raise BaseNeeded(
            f"the change of the weight of '{path}' depends on the base",
            next_step="pass model=, the base that the adapter was trained on",
        )
    else:
        weight = view.base.weight(view.sites[path])
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        u, s, vh = torch.linalg.svd(merge_weight(change, wide) - wide, full_matrices=False)
    return vh[..., :rank, :], u[..., :, :rank] * s[..., None, :rank]


def compute_product_svd(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (…, m, r), Σ (…, r) and Vᵀ (…, r, n) of B·A from its factors, without the product."""
    (left, inner), (right, outer) = torch.linalg.qr(b), torch.linalg.qr(a.mT)
    u, s, vh = torch.linalg.svd(inner @ outer.mT, full_matrices=False)
    return left @ u, s, vh @ right.mT


def _differing_patterns(values: Mapping[str, T], path: str) -> dict[str, T]:
    """Return the values that differ from that at ``path``, by patterns that match one whole path each."""
    return {f"^{re.escape(key)}": value for key, value in values.items() if value != values[path]}
