"""An adapter as tensors: its change at each site, in factors where its method has factors."""

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lorac.adapters.adapter_sites import add_adapted_modules
from lorac.adapters.fit import check_adapter, check_site, check_values
from lorac.adapters.fresh import add_replaced_parameters
from lorac.adapters.preparation import Preparer
from lorac.argument_types import check_type
from lorac.errors import BaseNeeded, CompileError, LoracError, UnknownMethod, unmergeable_error
from lorac.frontend.model_view import Model, ModelView
from lorac.ir.algebra import operands
from lorac.ir.algebra.changes import Change
from lorac.ir.sites.site import BaseReader, Site, SiteKind
from lorac.ir.slots.plans import BranchTerm
from lorac.variants.adapter import Adapter

_OUT, _IN = 9973, 9967
"""Sizes of a probe that shows which axes of a parameter are a site's outputs and inputs: primes, which are the sizes of
no other axis."""


def factors(adapter: Adapter, model: Model | None = None, *, dtype: torch.dtype | None = None) -> dict[str, Change]:
    """Return an adapter's change at each site at strength 1: low-rank factors if the method has them, else W'.

    Each change is of one of these classes; b' = b + e, and e (out,) is None where the bias does not change:

    - ``LowRank``: W' = c∘W·Tᵀ∘d + h∘(A∘g·B)ᵀ with the attributes ``a``, A (in, R), ``b``, B (R, out), ``e``, and
      ``parts``: the other operands that are not 1, by letter: ``"c"`` (out,), ``"d"`` (in,), ``"t"``, the
      blocks (n, k, k) of T, ``"g"`` (R,), ``"h"`` (out,). ``folded()`` multiplies g and h into b, ``rank`` is R.
    - ``Sparse``: ``values`` (k,) added to W at ``rows`` (k,) and ``cols`` (k,), and ``e``.
    - ``Delta``: ``delta`` D (out, in) is added to W, and ``e``.
    - ``Dense``: ``weight`` is W' (out, in), and ``e``.

    W is the matrix (out, in) that sites present: kernels flattened, embeddings and GPT-2's layers transposed. A
    replaced parameter that belongs to no site, such as a norm's scale, has its name as path and is ``Dense`` in its
    stored shape.

    Args:
        adapter: an adapter of a method that edits weights, or whose branch equals an edit; it is only read, but changes
            may share its memory.
        model: the base, or several by name; it is only read. Needed if a change depends on the base's weight or bias
            (DoRA, HiRA, every ``Dense`` change and replacement), and if the adapter's tensors do not determine the
                site's shape.
        dtype: computation dtype; default: the factors' dtype, which is float32 for a base in half precision.

    Returns:
        Site path -> change, in the adapter's order.

    Raises:
        BaseNeeded: a change needs a model, and none is given.
        CompileError: the method's branch is not a change of a weight at some site.
        SiteError, AdapterError, FormatError: the adapter does not fit the model, as ``load_adapter`` says.
        WrongType: ``adapter`` is not an adapter.
    """
    check_type(adapter, Adapter, "the adapter of lorac.factors", next_step="give an adapter: lorac.load_adapter(path)")
    view = None if model is None else ModelView.of(model)
    return dict(_iter_own_changes(adapter, dtype) if view is None else iter_changes(None, adapter, view, dtype))


@torch.no_grad()
def iter_changes(
    paths: Iterable[str] | None, adapter: Adapter, view: ModelView, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Change]]:
    """Yield the changes of ``factors`` site by site, so that at most one dense change is in memory.

    Args:
        paths: paths of sites that the adapter touches; None: all such sites.
        adapter, dtype: as ``factors`` takes them.
        view: the base.
    """
    check_adapter(adapter, view)
    _require_edits(adapter)
    sites = add_adapted_modules(adapter, add_replaced_parameters(adapter, view)).sites
    if dtype is not None:
        sites = {path: dataclasses.replace(site, dtype=dtype) for path, site in sites.items()}
    preparer = Preparer(sites, view.base, keep_factors=True)
    for path in preparer.touched(adapter) if paths is None else paths:
        yield path, _change(preparer, adapter, path)


def touched_paths(adapter: Adapter, view: ModelView) -> list[str]:
    """Return the paths of the sites that an adapter touches, and the names of other parameters that it replaces."""
    view = add_adapted_modules(adapter, add_replaced_parameters(adapter, view))
    return Preparer(view.sites, view.base).touched(adapter)


@torch.no_grad()
def _iter_own_changes(adapter: Adapter, dtype: torch.dtype | None) -> Iterator[tuple[str, Change]]:
    """Yield the changes that the adapter's tensors determine without a model."""
    _require_edits(adapter)
    if adapter.replaced:
        raise _base_needed(f"the site of '{next(iter(adapter.replaced))}', a parameter that '{adapter.name}' replaces")
    check_values(adapter)
    sites = {path: _infer_site(adapter, path, dtype) for path in adapter.tensors}

    def weight(site: Site) -> Tensor:
        raise _base_needed(f"the change of '{site.path}' by adapter '{adapter.name}'")

    preparer = Preparer(sites, BaseReader(weight, lambda site: None), keep_factors=True)
    for path, tensors in adapter.tensors.items():
        if operands.BIAS in preparer.reduction(adapter.variant, sites[path], tensors).outputs:
            raise _base_needed(f"the change of the bias of '{path}' by adapter '{adapter.name}'")
        yield path, _change(preparer, adapter, path)


def _change(preparer: Preparer, adapter: Adapter, path: str) -> Change:
    term = preparer.term(adapter, path)
    if isinstance(term, BranchTerm):
        raise _not_an_edit(adapter, path)
    return term


def _require_edits(adapter: Adapter) -> None:
    """Refuse a method of virtual tokens, which cannot be merged into a weight."""
    if adapter.variant.prompt:
        raise _not_an_edit(adapter, adapter.sites[0])


def _not_an_edit(adapter: Adapter, path: str) -> CompileError:
    return unmergeable_error(
        f"'{adapter.name}' ({adapter.variant.name}) does not edit the weight of '{path}'",
        next_step="use a method that edits weights; `lorac variants` lists them",
    )


def _infer_site(adapter: Adapter, path: str, dtype: torch.dtype | None) -> Site:
    """Return a linear site whose shape fits an adapter's tensors; most formulas read only this shape."""
    tensors = adapter.tensors[path]
    dtypes = (tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    probe = Site(path, SiteKind.LINEAR, _OUT, _IN, dtype or next(dtypes, torch.float32), weight=None)
    try:
        specs = adapter.variant.at(probe).params(probe)
        found = {
            (size, actual)
            for name, spec in specs.items()
            if not spec.shared and name in tensors
            for size, actual in zip(spec.shape, tensors[name].shape, strict=False)
        }
        [out] = [actual for size, actual in found if size == _OUT]
        [columns] = [actual for size, actual in found if size == _IN]
        site = dataclasses.replace(probe, out_features=out, in_features=columns)
        check_site(adapter.name, adapter.variant, site, tensors)
    except UnknownMethod:  # a model cannot replace the missing class
        raise
    except (LoracError, ValueError) as error:
        raise _base_needed(f"the shape of '{path}', since the tensors of '{adapter.name}' fit several") from error
    return site


def _base_needed(what: str) -> BaseNeeded:
    return BaseNeeded(f"only the base tells {what}", next_step="pass model=, the base that the adapter was trained on")
