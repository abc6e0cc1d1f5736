"""Rows of a weight that train alone: PEFT's ``trainable_token_indices``.

An adapter read from a file replaces the whole weight, so that code for replaced parameters also handles such rows. If
this weight were trained, all its rows would change; a training session therefore stores the rows in a part of method
TrainableTokens.
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
    """Replace the weights of which only some rows train by rows of ``TrainableTokens``.

    Args:
        adapter: an adapter that fits the model; its provenance lists the rows. Without such rows it is returned
            unchanged.
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
    if provenance.get("base"):  # the hash covers the weights of all sites
        provenance["base"] = compute_base_hash(view, tensors)
    return Adapter(adapter.name, Union.over(*parts, like=adapter.variant), tensors, rest, provenance)
