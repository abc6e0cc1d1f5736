"""One adapter for several models that are compiled together, made of one for each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant
from lorac.variants.union import Union


def join_components(parts: Mapping[str, Adapter], name: str) -> Adapter:
    """Return one adapter with the sites of all parts.

    Args:
        parts: component -> its adapter, with paths within the component.
        name: the name of the result.

    Raises:
        OptionError: the parts differ in method, and one of them cannot be part of a union.
    """
    located = {component: _locate(component, part) for component, part in parts.items()}
    variants = [part.variant for part in located.values()]
    return Adapter(
        name,
        _join_variants(variants),
        {path: tensors for part in located.values() for path, tensors in part.tensors.items()},
        {path: tensor for part in located.values() for path, tensor in part.replaced.items()},
    )


def _locate(component: str, part: Adapter) -> Adapter:
    """Return an adapter of a component with paths from the whole, and the paths of its sites as its targets."""
    tensors = {f"{component}.{path}": at for path, at in part.tensors.items()}
    replaced = {f"{component}.{name}": tensor for name, tensor in part.replaced.items()}
    variant = dataclasses.replace(part.variant, targets=tuple(tensors), exclude=(), layers=())
    return dataclasses.replace(part, variant=variant, tensors=tensors, replaced=replaced)


def _join_variants(variants: list[Variant]) -> Variant:
    first, targets = variants[0], tuple(path for variant in variants for path in variant.targets)
    if all(dataclasses.replace(variant, targets=first.targets) == first for variant in variants):
        return dataclasses.replace(first, targets=targets)
    return Union.over(*variants, like=first)
