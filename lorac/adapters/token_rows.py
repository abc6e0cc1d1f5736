"""Rows of a weight that train by themselves: PEFT's ``trainable_token_indices``.

A file's adapter replaces the whole weight, so that whatever reads replaced parameters reads these too. Trained as it
is, the weight would move with all its rows; a session that trains holds them as a part of method TrainableTokens.
"""

from dataclasses import replace

import torch
from torch import Tensor

from lorac.adapters.base_hash import compute_base_hash
from lorac.frontend.model_view import ModelView
from lorac.variants.adapter import TOKEN_ROWS, Adapter
from lorac.variants.trainable_tokens import TrainableTokens
from lorac.variants.union import Union


def split_token_rows(adapter: Adapter, view: ModelView) -> Adapter:
    """Return an adapter with rows of ``TrainableTokens`` in place of the weights of which only these rows train.

    Args:
        adapter: one that fits the model; its provenance tells the rows. Without such rows it is returned as it is.
    """
    sites = (site for site in view.sites.values() if site.kind in TrainableTokens.kinds and site.is_layer)
    paths = {site.weight: site.path for site in sites if not site.transposed}
    numbers: dict[tuple[int, ...], list[str]] = {}
    for name, own in adapter.provenance.get(TOKEN_ROWS, {}).items():
        if name in paths:
            numbers.setdefault(tuple(own), []).append(name)
    if not numbers:
        return adapter
    parts = list(adapter.variant.methods)
    if not isinstance(adapter.variant, Union):
        parts = [replace(adapter.variant, targets=adapter.sites, exclude=(), layers=())]
    tensors, rest = dict(adapter.tensors), dict(adapter.replaced)
    for own, names in numbers.items():
        whole = {paths[name]: rest.pop(name) for name in names}
        rows: dict[str, Tensor] = {}
        for path, weight in whole.items():
            alike = (at for at in view.sites[path].shares if at in rows and torch.equal(weight, whole[at]))
            source = next(alike, None)
            rows[path] = weight[list(own)] if source is None else rows[source]
        tied = len({id(tensor) for tensor in rows.values()}) < len(rows)
        part = TrainableTokens(token_indices=own, targets=tuple(whole), tied=tied)
        tensors |= {path: part.hold_rows(view.sites[path], own_rows) for path, own_rows in rows.items()}
        parts.append(part)
    provenance = {key: value for key, value in adapter.provenance.items() if key != TOKEN_ROWS}
    if provenance.get("base"):  # a hash over the weights of all sites
        provenance["base"] = compute_base_hash(view, tensors)
    return Adapter(adapter.name, Union.over(*parts, like=adapter.variant), tensors, rest, provenance)
