"""The sites that a model has because an adapter names them: modules, and what an adapter computes once per call."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lorac.ir.host.modules import callable_paths, module_sites, told_site
from lorac.ir.host.patterns import KEYWORDS, names
from lorac.ir.host.sites import Site, SiteKind
from lorac.ir.slots.reads import ONCE_PREFIX, once_site
from lorac.variants._absent import Absent
from lorac.variants.adapter import Adapter
from lorac.variants.base import BranchVariant, Variant


def with_named(variant: Variant, model: nn.Module, sites: Mapping[str, Site]) -> dict[str, Site]:
    """All sites, those among them that the modules become which a method's ``targets`` name.

    A list means what it names; of what one regular expression matches, modules whose structure does not tell their
    width are left out.

    Raises:
        SiteError: the structure of a module that a list names does not tell its width.
    """
    targets = variant.targets
    branches = any(isinstance(one, BranchVariant) and SiteKind.BLOCK in one.kinds for one in variant.methods)
    if not branches or (isinstance(targets, str) and targets in KEYWORDS):
        return dict(sites)
    free = [path for path in callable_paths(model) if path not in sites]
    wanted = [path for path in free if names(targets, path) and not (variant.exclude and names(variant.exclude, path))]
    if not isinstance(targets, str):
        return {**sites, **module_sites(wanted, model, sites)}
    told = {path: told_site(path, model, sites) for path in wanted}
    return {**sites, **{path: site for path, site in told.items() if site is not None}}


def with_adapted(adapter: Adapter, model: nn.Module, sites: Mapping[str, Site]) -> dict[str, Site]:
    """All sites, those among them that modules become at which an adapter of a branch has tensors."""
    if not any(isinstance(one, BranchVariant | Absent) for one in adapter.variant.methods):
        return dict(sites)
    missing = adapter.tensors.keys() - sites.keys()
    wanted = [path for path in callable_paths(model) if path in missing] if missing else []
    return {**sites, **module_sites(wanted, model, sites)}


def once_sites(adapter: Adapter, sites: Mapping[str, Site]) -> dict[str, Site]:
    """The site at which an adapter computes what it computes once per call, where it does."""
    path = once_path(adapter)
    return {path: once_site(path, sites[next(iter(adapter.tensors))].dtype)} if path else {}


_PATHS: WeakKeyDictionary[Adapter, str] = WeakKeyDictionary()
"""Adapter -> what follows: in training it is asked at every site of every step."""


def once_path(adapter: Adapter) -> str:
    """The path of that site; empty where a method computes nothing once.

    Adapters of one structure have one: method and settings are the same, and the shapes of tensors at the same sites.
    """
    variant = adapter.variant
    if not (isinstance(variant, BranchVariant) and variant.has_once):
        return ""
    if adapter not in _PATHS:
        told = [repr(sorted(variant.own_settings.items())), *_spelled(adapter.tensors)]
        digest = hashlib.blake2b("\0".join(told).encode(), digest_size=4).hexdigest()
        _PATHS[adapter] = f"{ONCE_PREFIX}{variant.name}-{digest}"
    return _PATHS[adapter]


def _spelled(tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> Iterable[str]:
    for path, held in sorted(tensors.items()):
        yield f"{path} {sorted((name, tuple(tensor.shape)) for name, tensor in held.items())}"
