"""``lorac.merge``: one adapter from several, in any of the ways of ``lorac.merging.ways``."""

import functools
import heapq
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from lorac.adapters.adapter_sites import add_adapted_modules
from lorac.adapters.edits import hold_changes
from lorac.adapters.factors import factors, iter_changes, touched_paths
from lorac.adapters.fit import check_values, refuse_invocation
from lorac.adapters.fresh import add_replaced_parameters
from lorac.adapters.lora_conversion import truncate_change
from lorac.argument_types import describe_value, matches_type
from lorac.errors import ChoiceError, shape_error, short
from lorac.formats._site_layouts import LAYOUT
from lorac.frontend.model_view import Model, ModelView
from lorac.ir.algebra.changes import Change, LowRank, merge_bias, merge_weight
from lorac.merging.merged_model import read_adapters
from lorac.merging.registry import check_count, make_way, order_by_name
from lorac.merging.terms import SiteTerms, scale_change, shape_of
from lorac.merging.way import AdaptersWay, SiteWay
from lorac.progress import progress
from lorac.session.request.sources import read_sources
from lorac.variants.adapter import TOKEN_ROWS, Adapter
from lorac.variants.lora import LoRA

Weights = Mapping[str, float] | Sequence[float]


@torch.no_grad()
def merge(
    adapters: Mapping[str, Adapter | str | os.PathLike[str]] | Iterable[Adapter | str | os.PathLike[str]],
    method: str = "ties",
    weights: Weights | None = None,
    model: Model | None = None,
    *,
    name: str = "merged",
    dtype: torch.dtype | None = None,
    **options: object,
) -> Adapter:
    """Merge several adapters of any methods and ranks into one.

    The result is a LoRA if every site's merged change is a product of factors, else an ``Edit``. Parameters that an
    adapter replaces whole (``modules_to_save``, biases) are merged as changes from the base. An adapter that does not
    change a site has the change 0 there. One adapter at weight 1 is returned unchanged, unless an option prunes it.

    Args:
        adapters: adapters, or paths of their files, by name or in a list; they are only read.
        method: the name of a way: ``lorac.merging.ways()`` has them, and docs/merging.md a table.
        weights: the adapters' weights, by name or in order; default: 1 each.
        model: the base, or several by name; it is only read. Needed if a change depends on the base, as DoRA's does, or
            if parameters are replaced whole.
        name: name of the result.
        dtype: dtype of the result; default: the promoted dtype of all adapters' tensors.
        **options: options of the way, by the names of its fields. A value per adapter may be a list, or a mapping by
            name.

    Raises:
        OptionError: there is no such way, or the way has no such option or value.
        ChoiceError: the weights are not one finite number for each adapter, or do not suit the way.
        AdapterError: two adapters have one name, or were made for different models; or the result is not finite.
        CompileError: the way cannot read an adapter's change (code ``not_mergeable``).
        BaseNeeded: a change depends on the base, and there is no model.
        FormatError, SiteError: a file cannot be read, or does not fit the model.
    """
    view = None if model is None else ModelView.of(model)
    sources = [replace(one, name=key) for key, one in read_adapters(read_sources(adapters), view).items()]
    if not sources:
        raise ChoiceError("there are no adapters to merge", next_step="give at least one")
    names = [adapter.name for adapter in sources]
    way, strengths = make_way(method, options, names), _read_weights(weights, names)
    if len(sources) == 1 and strengths == [1] and way.keeps_one:
        merged = replace(sources[0], name=name)
    else:
        check_count(way, len(sources))
        for one in sources:
            refuse_invocation(one, "a merged adapter acts on every token")
        made_of = way.assemble if isinstance(way, AdaptersWay) else functools.partial(merge_sites, cast(SiteWay, way))
        merged = made_of(sources, strengths, name, view)
    described = {"method": method, "weights": dict(zip(names, strengths, strict=True)), "options": dict(options)}
    if dtype is not None:
        merged = merged.to(dtype)
    check_values(merged)
    merged.provenance = {**merged.provenance, "merged": {**described, **merged.provenance.get("merged", {})}}
    return merged


def _read_weights(given: object, names: Sequence[str]) -> list[float]:
    values = [1.0] * len(names) if given is None else given
    values = order_by_name("weights", values, names) if isinstance(values, Mapping) else values
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != len(names):
        raise ChoiceError(
            f"weights is {describe_value(given)}, and there are {len(names)} adapters",
            next_step=f"give a number for each: {{{', '.join(f'{name!r}: 1.0' for name in names)}}}",
        )
    for name, value in zip(names, values, strict=True):
        if not matches_type(value, float) or not math.isfinite(value):
            raise ChoiceError(f"the weight of '{name}' is {short(value)}", next_step="give a finite number")
    return [float(value) for value in values]


def merge_sites(
    way: SiteWay, adapters: Sequence[Adapter], weights: Sequence[float], name: str, view: ModelView | None
) -> Adapter:
    """Merge adapters site by site; ``provenance["errors"]`` of the result has the errors of truncated sites."""
    for adapter in adapters:
        if view is not None:  # add sites for every module and parameter that an adapter names
            view = add_adapted_modules(adapter, add_replaced_parameters(adapter, view))
    adapted = {path for adapter in adapters for path in adapter.tensors}
    every = _iter_terms(adapters, weights, view, torch.Generator())
    way = way.survey(terms for terms in every if terms.path in adapted)
    found: dict[str, Change] = {}
    errors: dict[str, float] = {}
    with progress("merge", total=len(adapted)) as report:
        for terms in _iter_terms(adapters, weights, view, torch.Generator().manual_seed(way.seed)):
            report.step(terms.path)
            merged = way.merge_site(terms) if terms.path in adapted else way.merge_replaced(terms)
            if way.scale != 1:
                merged = scale_change(merged, way.scale)
            rank = way.result_rank(terms) if terms.path in adapted else None
            if terms.path in adapted and not (rank is None and way.tolerance is None):
                nearest = truncate_change(terms.path, merged, view, rank, way.tolerance or 0.0)
                merged, errors[terms.path] = LowRank(nearest.a.mT, nearest.b.mT, e=merged.e), nearest.error
            found[terms.path] = merged
    tensors = (tensor for adapter in adapters for tensor in adapter.parameters() if tensor.is_floating_point())
    dtype = functools.reduce(torch.promote_types, [torch.float32 if t.itemsize == 1 else t.dtype for t in tensors])
    changes = {path: change for path, change in found.items() if path in adapted}
    replaced = {path: change for path, change in found.items() if path not in adapted}
    whole: dict[str, Tensor] = {}  # by name, the parameters that change at sites where no adapter has tensors
    for path, change in replaced.items():
        assert view is not None  # without a model, every path has tensors
        site, bias = view.sites[path], merge_bias(change, view.base.bias(view.sites[path]))
        if site.weight and not (isinstance(change, LowRank) and change.rank == 0):
            stored = view.base.weight(site)
            wide = stored.to(torch.promote_types(stored.dtype, torch.float32))
            whole[site.weight] = site.store(merge_weight(change, wide)).to(dtype)
        if site.bias and change.e is not None and bias is not None:
            whole[site.bias] = bias.to(dtype)
    variants = [adapter.variant for adapter in adapters]
    like = LoRA(  # a method with the fields for all parameters that the methods train besides their tensors
        parameters=tuple(dict.fromkeys(path for one in variants for path in one.parameters)),
        modules_to_save=tuple(dict.fromkeys(path for one in variants for path in one.modules_to_save)),
        bias="all" if any(one.bias == "all" for one in variants) else "none",
    )
    result = hold_changes(name, changes, like=like, replaced=whole, dtype=dtype)
    inexact = {path: error for path, error in errors.items() if error}
    layouts = {path: layout for one in adapters for path, layout in one.provenance.get(LAYOUT, {}).items()}
    result.provenance |= {**({"errors": inexact} if inexact else {}), LAYOUT: layouts}
    for weight in whole:
        numbers = [one.provenance.get(TOKEN_ROWS, {}).get(weight, ()) for one in adapters if weight in one.replaced]
        if numbers and all(numbers):
            result.provenance.setdefault(TOKEN_ROWS, {})[weight] = sorted({row for own in numbers for row in own})
    return result


def _iter_terms(
    adapters: Sequence[Adapter], weights: Sequence[float], view: ModelView | None, generator: torch.Generator
) -> Iterator[SiteTerms]:
    """Yield the changes of each site, in the order of the sites' names; one change per adapter is in memory."""
    streams: list[Iterator[tuple[int, tuple[str, Change]]]] = []
    for index, adapter in enumerate(adapters):
        if view is None:
            own: Iterable[tuple[str, Change]] = sorted(factors(adapter).items())
        else:
            own = iter_changes(sorted(touched_paths(adapter, view)), adapter, view)
        streams.append(zip(itertools.repeat(index), own, strict=False))
    in_order = heapq.merge(*streams, key=lambda one: (one[1][0], one[0]))
    for path, group in itertools.groupby(in_order, lambda one: one[1][0]):
        found = {index: change for index, (_, change) in group}
        changes = [found.get(index) for index in range(len(adapters))]
        _check_shapes(path, adapters, changes)
        reader = None if view is None else functools.partial(view.base.weight, view.sites[path])
        yield SiteTerms(path, adapters, weights, changes, reader, generator)


def _check_shapes(path: str, adapters: Sequence[Adapter], changes: Sequence[Change | None]) -> None:
    shapes = {one.name: shape_of(change) for one, change in zip(adapters, changes, strict=True) if change is not None}
    known = {name: shape for name, shape in shapes.items() if shape is not None}
    if len(set(known.values())) > 1:
        listed = ", ".join(f"{shape} in '{name}'" for name, shape in known.items())
        raise shape_error(
            f"the adapters were made for different layers at '{path}': {listed}",
            next_step="merge adapters of one base model",
        )
