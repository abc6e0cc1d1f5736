"""Terms that remain branches: the slots that an adapter's formula needs, and the tensors that fill them."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from lorac.adapters.adapter_sites import get_once_path
from lorac.ir.algebra.formulas import Formula
from lorac.ir.sites.site import Site, cast_floating, factor_dtype
from lorac.ir.slots.plans import BranchSlot, BranchTerm
from lorac.variants.adapter import Adapter
from lorac.variants.base import BranchVariant, Variant


def make_branch_term(adapter: Adapter, site: Site, *, detach: bool = True) -> BranchTerm:
    """Return the branch term of a site; adapters with equal structure share its slot.

    If the method defines ``once``, shared tensors are left out of the term.
    """
    variant, tensors, once = adapter.variant.at(site), adapter.tensors[site.path], get_once_path(adapter)
    assert isinstance(variant, BranchVariant)
    if once:
        tensors = {name: tensors[name] for name, spec in variant.specs(site).items() if not spec.shared}
    slot = _make_slot(variant, variant.branch, tensors, once, site.path)
    return BranchTerm(
        replace(slot, emits=variant.emits, reads=variant.reads(site), instead=variant.instead),
        _cast_parameters(tensors, site, detach=detach),
    )


def make_once_term(adapter: Adapter, sites: Mapping[str, Site], *, detach: bool = True) -> BranchTerm:
    """Return the term of an adapter's ``once`` site."""
    variant, first = adapter.variant, sites[adapter.sites[0]]
    assert isinstance(variant, BranchVariant)
    shared = [name for name, spec in variant.at(first).specs(first).items() if spec.shared]
    tensors = {name: adapter.tensors[first.path][name] for name in shared}
    path = get_once_path(adapter)
    slot = _make_slot(variant, variant.once, tensors, path, path)
    return BranchTerm(
        replace(slot, reads=variant.reads_once(), once=""), _cast_parameters(tensors, first, detach=detach)
    )


def describe_structure(variant: Variant) -> str:
    """Return the hyper-parameters that a formula may read, as text; patterns that select sites are left out."""
    return repr({name: value for name, value in variant.own_settings.items() if not name.endswith("_pattern")})


def _make_slot(
    variant: BranchVariant, function: Callable[..., object], tensors: Mapping[str, Tensor], once: str, path: str
) -> BranchSlot:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    key = f"{variant.name}{describe_structure(variant)}{sorted(shapes.items())}{once}"
    return BranchSlot(key, Formula(function, variant.name, path), shapes, once=once, mixes=variant.mixes_tokens)


def _cast_parameters(tensors: Mapping[str, Tensor], site: Site, *, detach: bool) -> tuple[Tensor, ...]:
    dtype = factor_dtype(site.dtype)
    return tuple(cast_floating(tensor.detach() if detach else tensor, dtype) for tensor in tensors.values())
