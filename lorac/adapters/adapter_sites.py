"""Sites that a model gets because an adapter names them: modules, and the site for the values of ``once``."""

import hashlib
from collections.abc import Mapping
from weakref import WeakKeyDictionary

from lorac.frontend.model_view import ModelView
from lorac.frontend.module_sites import infer_module_site, make_module_sites
from lorac.ir.sites.patterns import TARGET_KEYWORDS, is_named
from lorac.ir.sites.site import Site, SiteKind
from lorac.ir.slots.program_values import ONCE_PREFIX, make_once_site
from lorac.variants._missing_method import MissingMethod
from lorac.variants.adapter import Adapter
from lorac.variants.base import BranchVariant, Variant


def add_named_modules(variant: Variant, view: ModelView) -> ModelView:
    """Add sites for the modules that a method's ``targets`` name.

    Every module that a list names becomes a site; of the modules that a regular expression matches, those whose widths
    cannot be inferred are left out.

    Raises:
        SiteError: the widths of a module that a list names cannot be inferred.
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
    """Add sites for the modules at which an adapter with a branch method has tensors."""
    if not any(isinstance(one, BranchVariant | MissingMethod) for one in adapter.variant.methods):
        return view
    missing = adapter.tensors.keys() - view.sites.keys()
    wanted = [path for path in view.callable_paths if path in missing] if missing else []
    return view.with_sites(make_module_sites(wanted, view)) if wanted else view


def make_once_sites(adapter: Adapter, sites: Mapping[str, Site]) -> dict[str, Site]:
    """Return the site at which an adapter computes the values of ``once``; empty if its method has no ``once``."""
    path = get_once_path(adapter)
    return {path: make_once_site(path, sites[next(iter(adapter.tensors))].dtype)} if path else {}


_PATHS: WeakKeyDictionary[Adapter, str] = WeakKeyDictionary()
"""Cache of adapter -> its path, which training reads at every site in every step."""


def get_once_path(adapter: Adapter) -> str:
    """Return the path of an adapter's ``once`` site; empty if its method has no ``once``.

    Adapters of one structure share the path: their method, settings, sites and tensor shapes are equal.
    """
    variant = adapter.variant
    if not (isinstance(variant, BranchVariant) and variant.has_once):
        return ""
    if adapter not in _PATHS:
        parts = [repr(sorted(variant.own_settings.items()))]
        for path, tensors in sorted(adapter.tensors.items()):
            parts.append(f"{path} {sorted((name, tuple(tensor.shape)) for name, tensor in tensors.items())}")
        digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=4).hexdigest()
        _PATHS[adapter] = f"{ONCE_PREFIX}{variant.name}-{digest}"
    return _PATHS[adapter]
