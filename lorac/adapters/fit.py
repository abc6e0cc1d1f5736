"""Whether an adapter fits a model: its sites, its shapes, the weights it was made for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import nn

from lorac.adapters.base_hash import check_base, check_copy
from lorac.errors import (
    ShapeMismatch,
    SiteError,
    SiteNotFound,
    SiteUnsupported,
    UnusedTensors,
    nearest_name,
)
from lorac.ir.host.patterns import nothing_matches
from lorac.ir.host.sites import Site, find_sites
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant

Tensor = torch.Tensor
T = TypeVar("T")


def check_adapter(adapter: Adapter, model: nn.Module) -> None:
    """Hold an adapter against the model it is meant for.

    Raises:
        SiteNotFound: A path names no site, a replaced tensor no parameter, or there is nothing.
        SiteUnsupported: The module exists, but the method or lorac cannot adapt it.
        UnusedTensors: A tensor is no parameter of the method.
        ShapeMismatch: A tensor's shape does not fit, or a parameter of the method is missing.
        BaseMismatch: The base hash recorded in its file differs.
    """
    sites = find_sites(model)
    if not adapter.tensors and not adapter.replaced:
        raise nothing_matches(adapter.name, adapter.variant.targets, sites)
    free = bool(adapter.provenance.get("left_out"))
    for path, tensors in adapter.tensors.items():
        if path not in sites:
            raise no_site(adapter.name, path, sites, model)
        check_site(adapter.name, adapter.variant, sites[path], tensors, shapes=not free)
    for name, tensor in adapter.replaced.items():
        check_replaced(adapter.name, name, tensor, model)
    for name, copy in adapter.provenance.get("copies", {}).items():
        if name not in named_tensors(model):
            check_replaced(adapter.name, name, torch.empty(0), model)
        check_copy(adapter.name, name, copy, named_tensors(model)[name])
    recorded = adapter.provenance.get("base")
    if recorded:
        check_base(adapter.name, str(recorded), model, adapter.tensors)


def check_site(
    adapter: str, variant: Variant, site: Site, tensors: Mapping[str, Tensor], *, shapes: bool = True
) -> None:
    """Hold one site's tensors against what the method needs there.

    Args:
        adapter: The adapter's name, for messages.
        variant: The method.
        site: The site, with its shapes.
        tensors: Parameter name -> tensor.
        shapes: False compares names and numbers of axes only.

    Raises:
        SiteUnsupported: The method is not defined on the site's kind.
        UnusedTensors: A parameter is one too many.
        ShapeMismatch: A shape differs, or a parameter is missing.
    """
    here = variant.at(site)
    here.check(site)
    specs = here.params(site)
    has = f"{variant.name} as configured has {', '.join(specs)} there"
    for name in tensors:
        if name not in specs:
            what = f"adapter '{adapter}' has a tensor '{name}' at '{site.path}' too many"
            raise UnusedTensors(what, nearest=nearest_name(name, specs), next_step=has)
    for name in specs:
        if name not in tensors:
            what = f"adapter '{adapter}' lacks the tensor '{name}' at '{site.path}'"
            raise ShapeMismatch(what, next_step=has)
    for name, spec in specs.items():
        found = tuple(tensors[name].shape)
        if not spec.admits(found) if shapes else len(found) != len(spec.shape):
            raise ShapeMismatch(
                f"adapter '{adapter}': {name} at '{site.path}' has shape {found}, expected {spec.shape}",
                next_step=f"the site is {site.kind} {site.in_features} -> {site.out_features}; "
                "rank and base model must be those of the training",
            )


def check_replaced(adapter: str, name: str, tensor: Tensor, model: nn.Module) -> None:
    """Hold a replacement against the parameter or buffer it replaces.

    Raises:
        SiteNotFound: The model has no such parameter or buffer.
        ShapeMismatch: It has another shape.
    """
    known = named_tensors(model)
    if name not in known:
        raise SiteNotFound(
            f"adapter '{adapter}' replaces '{name}', which the model does not have",
            nearest=nearest_name(name, known),
            next_step="load the class of model that the adapter was trained on",
        )
    if known[name].shape != tensor.shape:
        step = "load the base model that the adapter was trained on"
        if known[name].shape[1:] == tensor.shape[1:] and tensor.ndim == 2:
            step = f"call model.resize_token_embeddings({tensor.shape[0]}) if the vocabulary has grown"
        raise ShapeMismatch(
            f"adapter '{adapter}' replaces '{name}' by shape {tuple(tensor.shape)}, "
            f"the model's has {tuple(known[name].shape)}",
            next_step=step,
        )


def in_order(tensors: Mapping[str, T], model: nn.Module | None) -> dict[str, T]:
    """By site path, in the model's order; without one, paths as text with numbers as numbers."""
    if model is None:
        return {path: tensors[path] for path in sorted(tensors, key=_natural)}
    place = {path: index for index, path in enumerate(find_sites(model))}
    return {p: tensors[p] for p in sorted(tensors, key=lambda p: (place.get(p, -1), _natural(p)))}


def no_site(adapter: str, path: str, sites: Iterable[str], model: nn.Module) -> SiteError:
    """The error for a path that is no site, be it no module at all or one lorac cannot adapt."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return SiteNotFound(
            f"adapter '{adapter}' has tensors for '{path}', which is no module of the model",
            nearest=nearest_name(path, sites),
            next_step="load the class of model that the adapter was trained on; `lorac sites MODEL` prints its sites",
        )
    return SiteUnsupported(
        f"adapter '{adapter}' has tensors for '{path}', a {type(module).__name__} as built here is not a site",
        next_step="train the adapter with exclude_modules naming it",
    )


def _natural(path: str) -> tuple[tuple[bool, int, str], ...]:
    parts = (part for part in re.split(r"(\d+)", path) if part)
    return tuple((part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every name they go by."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
