"""Checks that an adapter fits a model: sites, shapes, values, and the weights for which it was made."""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from lorac.adapters.adapter_sites import add_adapted_modules
from lorac.adapters.base_hash import check_base, check_copy
from lorac.adapters.name_repair import REPAIR, find_own_names
from lorac.errors import (
    AdapterError,
    FormatError,
    LoracError,
    SiteError,
    missing_site_error,
    nearest_name,
    shape_error,
    unmergeable_error,
    unused_error,
)
from lorac.frontend.model_view import ModelView
from lorac.ir.sites.patterns import no_match_error
from lorac.ir.sites.site import Site
from lorac.limits import check_time, pause_clock
from lorac.variants.adapter import Adapter
from lorac.variants.base import BranchVariant, Variant, invocation_of, iterate_fields
from lorac.variants.params import ParamSpec, Role

_NUMBER = re.compile(r"\d+")
T = TypeVar("T")
_SUMMED_IN_ONE = 1 << 14
"""Most numbers that torch sums in one thread."""
_SUMMED_BY_NUMPY = frozenset({torch.float32, torch.float64})


def check_adapter(adapter: Adapter, view: ModelView | None) -> None:
    """Check an adapter against its model, before anything is computed from it; without a model, check nothing.

    This is the only check: files, compiling and adding at run time all call it, so that each fault has one error and
    one text everywhere. A field that an adapter's file could not store (``provenance["left_out"]``) may have decided
    the shapes of its tensors; then only their names and numbers of axes are compared.

    Args:
        adapter: the adapter; only read.
        view: the model, or its skeleton; if a base hash is recorded, with the values of the adapted weights.

    Raises:
        SiteError: a path is not a site, a replaced tensor not a parameter, a value that a branch reads does not exist,
            the adapter is empty, or the method or lorac cannot adapt a module.
        FormatError: a tensor is not a parameter of the method.
        AdapterError: a parameter is missing or has another shape or dtype; a position is outside the weight or is given
            twice; a tensor or a hyper-parameter is NaN or infinite; the recorded base hash differs or is invalid.
    """
    for check in () if view is None else _iter_checks(adapter, view):
        check()


def list_faults(adapter: Adapter, view: ModelView) -> list[LoracError]:
    """Return every error for which an adapter does not fit a model; ``check_adapter`` raises the first of them."""
    faults = []
    for check in _iter_checks(adapter, view):
        try:
            check()
        except LoracError as error:
            faults.append(error)
    return faults


def _iter_checks(adapter: Adapter, view: ModelView) -> Iterator[Callable[[], object]]:
    """Yield the parts of the check in order; each raises its errors, and none depends on an earlier part."""
    name, variant = adapter.name, adapter.variant
    yield partial(check_numbers, name, variant)
    yield partial(_check_invocation, adapter)
    if not adapter.tensors and not adapter.replaced:
        yield partial(_raise, no_match_error(name, variant.all_targets, view.sites))
    copies = adapter.provenance.get("copies", {})
    known = view.named_tensors() if adapter.replaced or copies else {}
    view = add_adapted_modules(adapter, view)
    sites = view.sites
    shapes = not adapter.provenance.get("left_out")
    for path, tensors in adapter.tensors.items():
        if path in sites:
            yield partial(check_site, name, variant, sites[path], tensors, shapes=shapes)
        else:
            yield partial(_raise, no_site_error(name, path, view))
    complete = adapter.tensors.keys() <= sites.keys()
    if complete:
        yield partial(check_reads, adapter, view)
    resizable = view.list_resizable(adapter.replaced) if adapter.replaced else ()
    for parameter, tensor in adapter.replaced.items():
        yield partial(check_replaced, name, parameter, tensor, known, resizable)
    yield partial(check_values, adapter)
    for parameter, copy in copies.items():
        yield partial(_find_replaced_tensor, name, parameter, known)
        if parameter in known:
            yield partial(check_copy, name, parameter, copy, view.as_given(parameter, view.tensor(parameter)))
    recorded = adapter.provenance.get("base")
    if recorded and complete:
        yield partial(check_base, name, str(recorded), view, adapter.tensors)


def _raise(error: LoracError) -> None:
    raise error


def check_reads(adapter: Adapter, view: ModelView) -> None:
    """Refuse an adapter whose branches read values that the program lacks.

    Raises:
        SiteError: a name is not a value, or ``once`` reads a value that is computed later.
    """
    branches = [method for method in adapter.variant.methods if isinstance(method, BranchVariant)]
    if not branches:
        return
    here = {path: adapter.variant.at(view.sites[path]) for path in adapter.tensors}
    reads = {path: one.reads(view.sites[path]) for path, one in here.items() if isinstance(one, BranchVariant)}
    once = [method for method in branches if method.has_once]
    if not any(reads.values()) and not once:
        return
    readable = view.readable_values
    readable.check((name for method in once for name in method.reads_once()), once=True)
    readable.check((name for names in reads.values() for name in names), owns=bool(once))


def check_values(adapter: Adapter) -> None:
    """Refuse an adapter whose tensors have NaN or infinity.

    Raises:
        AdapterError: as ``check_finite``.
    """
    named = {f"{path}.{name}": tensor for path, at in adapter.tensors.items() for name, tensor in at.items()}
    check_finite({**named, **adapter.replaced}, f"adapter '{adapter.name}'")


def _check_invocation(adapter: Adapter) -> None:
    """Refuse invocation tokens if another part of the adapter acts on every token.

    Raises:
        FormatError: a LoRA with invocation tokens is part of another method, or replaces tensors of the model.
    """
    own, parts = adapter.variant, iterate_fields(adapter.variant)
    inner = any(invocation_of(one) for one in parts if isinstance(one, Variant) and one is not own)
    if inner or (adapter.replaced and invocation_of(own)):
        part = next(iter(adapter.replaced), own.name)
        what = f"adapter '{adapter.name}' has invocation_tokens, and '{part}' of it acts on every token"
        step = "give invocation_tokens to a LoRA by itself, without modules_to_save= and bias="
        raise FormatError(what, next_step=step, code="unsupported_field")


def refuse_invocation(adapter: Adapter, why: str) -> None:
    """Refuse an adapter that acts only from its invocation tokens on, since merged weights act on every token.

    Raises:
        CompileError: the adapter has invocation tokens (code ``not_mergeable``).
    """
    if invocation_of(adapter.variant):
        raise unmergeable_error(
            f"adapter '{adapter.name}' acts from its invocation tokens on, and {why}",
            next_step="run it next to the weights, by lorac.compile(model, [adapter]) or `lorac serve`",
        )


def check_numbers(adapter: str, variant: Variant) -> None:
    """Refuse NaN and infinity in hyper-parameters, at any depth, and dropout rates out of range.

    Raises:
        AdapterError: a value is refused; the error names the field.
    """
    for field, setting in variant.settings.items():
        wrong = next(
            (value for value in iterate_fields(setting) if isinstance(value, float) and not math.isfinite(value)), None
        )
        if wrong is not None:
            raise AdapterError(
                f"the hyper-parameter '{field}' of adapter '{adapter}' is {wrong}",
                next_step=f"give {variant.name} a finite number",
                code="non_finite",
            )
    rate = variant.settings.get("dropout", 0.0)
    if not isinstance(rate, int | float) or not 0 <= rate <= 1:
        raise AdapterError(
            f"the hyper-parameter 'dropout' of adapter '{adapter}' is {rate!r}, but a rate lies between 0 and 1",
            next_step=f"give {variant.name} a rate such as dropout=0.1",
        )


def check_finite(tensors: Mapping[str, Tensor], owner: str) -> None:
    """Refuse tensors with NaN or infinity.

    Args:
        tensors: tensors by the names for the message.
        owner: the adapter or file with the tensors, for the message.

    Raises:
        AdapterError: a tensor has such values; the error names the first tensor and the number of values.
    """
    with pause_clock():
        suspected = {name: torch.isfinite(_widen(tensors[name])) for name in find_infinite_sums(tensors)}
    for name, finite in suspected.items():
        if not finite.all():
            raise AdapterError(
                f"tensor '{name}' of {owner} holds {int((~finite).sum())} NaN or infinite of {finite.numel()} values",
                next_step="its training diverged: take an earlier checkpoint",
                code="non_finite",
            )


def find_infinite_sums(tensors: Mapping[T, Tensor]) -> list[T]:
    """Return the names of tensors whose sum is not finite; a sum of finite values may overflow too.

    A sum takes a quarter of the time of a test of each value.
    """
    are_finite: dict[T, bool] = {}
    groups: dict[tuple[torch.dtype, torch.device], dict[T, Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        # On the CPU, sum in this thread only: if several threads read a file, torch's threads would wait for each
        # other.
        flat = tensor.detach().flatten()
        if flat.is_cpu and flat.dtype in _SUMMED_BY_NUMPY:
            are_finite[name] = math.isfinite(np.einsum("i->", flat.numpy()))
            continue
        parts = flat.split(_SUMMED_IN_ONE) if flat.is_cpu else [flat]
        total = torch.stack([_widen(part).sum() for part in parts]).sum()
        groups.setdefault((total.dtype, total.device), {})[name] = total
    for sums in groups.values():  # one synchronisation per device
        are_finite |= zip(sums, torch.stack([*sums.values()]).isfinite().tolist(), strict=True)
    return [name for name in tensors if not are_finite.get(name, True)]


def _widen(tensor: Tensor) -> Tensor:
    """Cast a tensor to a dtype that can be summed."""
    return tensor.float() if tensor.itemsize == 1 else tensor


def check_site(
    adapter: str, variant: Variant, site: Site, tensors: Mapping[str, Tensor], *, shapes: bool = True
) -> None:
    """Check a site's tensors against the parameters of the method at that site.

    Args:
        adapter: the adapter's name, for messages.
        site: the site, with its shapes.
        tensors: parameter name -> tensor.
        shapes: whether to compare shapes; else only names and numbers of axes.

    Raises:
        SiteError: the method is not defined on the site's kind.
        FormatError: a tensor is not a parameter.
        AdapterError: a parameter is missing or has another shape or dtype, or a position is outside the weight or is
            given twice.
    """
    check_time()
    here = variant.at(site)
    if shapes:
        here.check(site)
    else:  # a field that no file stores decides sizes, so that the method here would give other sizes
        Variant.check(here, site)
    specs = here.specs(site)
    parameters = f"{variant.name} as configured has {', '.join(specs)} there"
    for name in tensors:
        if name not in specs:
            what = f"adapter '{adapter}' has a tensor '{name}' at '{site.path}' that its method does not use"
            raise unused_error(what, nearest=nearest_name(name, specs), next_step=parameters)
    for name in specs:
        if name not in tensors:
            what = f"adapter '{adapter}' lacks the tensor '{name}' at '{site.path}'"
            raise shape_error(what, next_step=parameters)
    for name, spec in specs.items():
        check_parameter(adapter, name, spec, site, tensors[name], shapes=shapes)


def check_present(adapter: str, variant: Variant, site: Site, tensors: Mapping[str, Tensor]) -> None:
    """Check those tensors of a site that are present; the others are computed from them.

    Raises:
        AdapterError: as ``check_site``.
    """
    check_time()
    specs = variant.at(site).specs(site)
    for name in specs.keys() & tensors.keys():
        check_parameter(adapter, name, specs[name], site, tensors[name], shapes=True)


def check_parameter(adapter: str, name: str, spec: ParamSpec, site: Site, tensor: Tensor, *, shapes: bool) -> None:
    """Check one tensor against its parameter.

    Raises:
        AdapterError: as ``check_site``.
    """
    found = tuple(tensor.shape)
    if not spec.admits(found) if shapes else len(found) != len(spec.shape):
        raise shape_error(
            f"adapter '{adapter}': {name} at '{site.path}' has shape {found}, expected {spec.shape}",
            next_step=f"use the rank and the base model of the training; the site is {site.kind} {site.in_features} "
            f"-> {site.out_features}",
        )
    if spec.role is not Role.INDEX:
        if not tensor.is_floating_point():
            raise _wrong_dtype_error(adapter, f"{name} at '{site.path}'", tensor, "floating-point numbers")
        return
    if tensor.dtype is not torch.int64:
        whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)
        expected = "torch.int64" if whole else "whole numbers"
        raise _wrong_dtype_error(adapter, f"{name} at '{site.path}'", tensor, expected)
    if spec.below and not tensor.is_meta:
        with pause_clock():
            limits = torch.tensor(spec.below, dtype=torch.int64, device=tensor.device)[:, None]
            outside = ((tensor < 0) | (tensor >= limits)).any(dim=0)
            flat = tensor.new_zeros(())
            for column, limit in zip(tensor, spec.below, strict=True):  # sorting numbers is faster than sorting columns
                flat = flat * limit + column
            twice = tensor.shape[1] - len(torch.unique(flat))
        fault = f"{twice} positions of {name} at '{site.path}' are given twice" if twice else ""
        if bool(outside.any()):
            first = tuple(tensor[:, int(outside.nonzero()[0])].tolist())
            fault = f"{name} at '{site.path}' holds {first}, outside the shape {spec.below}"
        if fault:
            step = "load the base model that the adapter was trained on"
            raise AdapterError(f"adapter '{adapter}': {fault}", next_step=step, code="wrong_index")


def _wrong_dtype_error(adapter: str, subject: str, tensor: Tensor, expected: str) -> AdapterError:
    return AdapterError(
        f"adapter '{adapter}': {subject} is {tensor.dtype}, and the method takes {expected}",
        next_step="save the adapter again in the dtype it was trained in",
        code="wrong_dtype",
    )


def check_replaced(
    adapter: str, name: str, tensor: Tensor, known: Mapping[str, Tensor], resizable: Collection[str] = ()
) -> None:
    """Check a replacement against the parameter or buffer that it replaces.

    Args:
        adapter: the adapter's name, for messages.
        name: the name of the parameter or buffer.
        tensor: the replacement.
        known: the model's parameters and buffers by name.
        resizable: names of tensors that may have another number of rows than the model's.

    Raises:
        SiteError: the model has no such parameter or buffer.
        AdapterError: the replacement has another shape or another kind of numbers.
    """
    original = _find_replaced_tensor(adapter, name, known)
    resized = name in resizable and tensor.numel() > 0 and original.shape[1:] == tensor.shape[1:]
    if original.shape == tensor.shape or resized:
        kinds = {(t.is_floating_point(), t.is_complex(), t.dtype is torch.bool) for t in (original, tensor)}
        if len(kinds) > 1:
            raise _wrong_dtype_error(adapter, f"the replacement of '{name}'", tensor, f"{original.dtype} there")
        return
    step = "load the base model that the adapter was trained on"
    by_rows = tensor.ndim == 2 or (tensor.ndim == 1 and name.endswith(".bias"))
    if by_rows and original.ndim == tensor.ndim and original.shape[1:] == tensor.shape[1:]:
        step = f"load the model with {len(tensor)} rows there, the num_labels of a classifier, or call "
        step += f"model.resize_token_embeddings({len(tensor)}); lorac.compile also takes a whole layer of another size"
    raise shape_error(
        f"adapter '{adapter}' replaces '{name}' by a tensor of shape {tuple(tensor.shape)}, and the model's has "
        f"{tuple(original.shape)}",
        next_step=step,
    )


def sort_by_site(tensors: Mapping[str, T], view: ModelView | None) -> dict[str, T]:
    """Sort tensors by site path in the model's order; without a model, in natural order of the paths."""
    if view is None:
        return {path: tensors[path] for path in sorted(tensors, key=_natural_key)}
    place = {path: index for index, path in enumerate(view.callable_paths)}

    def find_place(path: str) -> int:
        """Return the index of a module, or of the module that owns a parameter."""
        return place.get(path, place.get(path.rpartition(".")[0], -1))

    return {path: tensors[path] for path in sorted(tensors, key=lambda path: (find_place(path), _natural_key(path)))}


def no_site_error(adapter: str, path: str, view: ModelView) -> SiteError:
    """Return the error for a path that is not a site: it is no module, or a module that lorac cannot adapt."""
    try:
        module = view.module.get_submodule(path)
    except AttributeError:
        others = [site for site in view.sites if _NUMBER.sub("*", site) == _NUMBER.sub("*", path)]
        fewer = f", where only {len(others)} have such names" if others else ""
        owner = next((name for name in view.components if f"{name}.{path}" in view.sites), None)
        step = "load the model that the adapter was trained on; `lorac sites MODEL` prints the sites of one"
        own = find_own_names([path], view)
        step = step if own is None else f"{REPAIR}, '{own[path]}'"
        return missing_site_error(
            f"adapter '{adapter}' has tensors for '{path}', which is not a module of the model{fewer}",
            nearest=nearest_name(path, others or view.sites),
            next_step=step if owner is None else f"give it as the adapter of one component: {{'{owner}': path}}",
        )
    return SiteError(
        f"adapter '{adapter}' has tensors for '{path}', a {type(module).__name__} that lorac cannot adapt",
        next_step="train the adapter with that layer in exclude_modules",
    )


def _find_replaced_tensor(adapter: str, name: str, known: Mapping[str, Tensor]) -> Tensor:
    """Return the model's tensor for which an adapter has a replacement or a copy."""
    if name not in known:
        raise missing_site_error(
            f"adapter '{adapter}' replaces '{name}', which the model does not have",
            nearest=nearest_name(name, known),
            next_step="load the class of model that the adapter was trained on",
        )
    return known[name]


def _natural_key(path: str) -> tuple[tuple[bool, int, str], ...]:
    parts = (part for part in re.split(r"(\d+)", path) if part)
    return tuple((part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts)
