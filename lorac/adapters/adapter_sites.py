"""The sites that a model has because an adapter names them: modules, and what an adapter computes once per call."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from weakref import WeakKeyDictionary

import torch

from lorac.frontend.model_view import ModelView
from lorac.frontend.module_sites import infer_module_site, make_module_sites
from lorac.ir.patterns import TARGET_KEYWORDS, is_named
from lorac.ir.sites import Site, SiteKind
from lorac.ir.slots.program_values import ONCE_PREFIX, make_once_site
from lorac.variants._missing_method import MissingMethod
from lorac.variants.adapter import Adapter
from lorac.variants.base import BranchVariant, Variant


def add_named_modules(variant: Variant, view: ModelView) -> ModelView:
    """All sites, those among them that the modules become which a method's ``targets`` name.

    A list means what it names; of what one regular expression matches, modules whose structure does not tell their
    width are left out.

    Raises:
        SiteError: the structure of a module that a list names does not tell its width.
    """
    targets = variant.targets
    branches = any(isinstance(one, BranchVariant) and SiteKind.BLOCK in one.kinds for one in variant.methods)
    if not branches or (isinstance(targets, str) and targets in TARGET_KEYWORDS):
        return view
    free = [path for path in view.callable_paths if path not in view.sites]
    wanted = [
        path for path in free if is_named(targets, path) and not (variant.exclude and is_named(variant.exclude, path))
    ]
    if not isinstance(targets, str):
        return view.with_sites(make_module_sites(wanted, view))
    inferred = {path: infer_module_site(path, view) for path in wanted}
    return view.with_sites({path: site for path, site in inferred.items() if site is not None})


def add_adapted_modules(adapter: Adapter, view: ModelView) -> ModelView:
    """All sites, those among them that modules become at which an adapter of a branch has tensors."""
    if not any(isinstance(one, BranchVariant | MissingMethod) for one in adapter.variant.methods):
        return view
    missing = adapter.tensors.keys() - view.sites.keys()
    wanted = [path for path in view.callable_paths if path in missing] if missing else []
    return view.with_sites(make_module_sites(wanted, view)) if wanted else view


def make_once_sites(adapter: Adapter, sites: Mapping[str, Site]) -> dict[str, Site]:
    """The site at which an adapter computes what it computes once per call, where it does."""
    path = get_once_path(adapter)
    return {path: make_once_site(path, sites[next(iter(adapter.tensors))].dtype)} if path else {}


_PATHS: WeakKeyDictionary[Adapter, str] = WeakKeyDictionary()
"""Adapter -> what follows: in training it is asked at every site of every step."""


def get_once_path(adapter: Adapter) -> str:
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
