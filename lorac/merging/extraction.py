"""``extract``: the difference of two checkpoints of one model as an adapter, computed site by site."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lorac.adapters.edits import hold_changes
from lorac.adapters.fit import check_finite
from lorac.adapters.lora_conversion import check_error, check_sizes
from lorac.adapters.truncation import truncate_matrix
from lorac.errors import AdapterError, FormatError, missing_site_error, nearest_name, shape_error, unmergeable_error
from lorac.formats._site_layouts import LAYOUT, site_to_json
from lorac.frontend.model_view import Model, ModelView
from lorac.ir.algebra.changes import Change, Delta, LowRank
from lorac.ir.sites.site import KINDS_WITHOUT_WEIGHT, Site, SiteKind
from lorac.merging.stored_model import StoredModel
from lorac.progress import progress
from lorac.storage.remote import find_source, parse_name
from lorac.variants.adapter import Adapter
from lorac.variants.lora import LoRA

Checkpoint = str | os.PathLike[str] | Model
"""A model's folder, the model, or several models by name."""


@torch.no_grad()
def extract(
    tuned: Checkpoint,
    base: Checkpoint,
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    name: str | None = None,
) -> Adapter:
    """Return the adapter that turns a base model into a fine-tuned one: exactly, or the nearest that a rank allows.

    The result is a ``LoRA`` if a rank or tolerance is given, else an ``Edit`` as large as the model. Parameters that
    belong to no layer, such as a norm's scale, are replaced whole. Folders are read one tensor at a time, so that
    neither model is loaded whole.

    Args:
        tuned, base: folders that transformers or diffusers wrote, by path or name; or models. Both are only read.
        rank: the largest rank at each site; the error, ‖ΔW − B·A‖ / ‖ΔW‖, is then close to the smallest possible.
        tolerance: the largest error. Without ``rank`` each site has the smallest rank within the tolerance; with
            ``rank``, a site that exceeds the tolerance is refused.
        name: name of the result; default: the name of the tuned model's folder.

    Returns:
        The adapter, with the error of each site in ``provenance["errors"]``.

    Raises:
        OptionError: ``rank`` or ``tolerance`` is out of range, or a folder contains no model.
        FormatError: a folder's weights are missing or damaged.
        SiteError, AdapterError: the two models differ in layers or sizes, contain NaN, or are equal.
        CompileError: a weight is quantised, or an error exceeds ``tolerance`` at this rank.
    """
    check_sizes(rank, tolerance)
    views = _open(tuned, "tuned"), _open(base, "base")
    _check_alike(*views)
    changes: dict[str, Change] = {}
    errors: dict[str, float] = {}
    with progress("extract", total=len(views[1].sites)) as report:
        for path, change in _iter_differences(*views):
            report.step(path)
            changes[path], error = _truncate(path, change, rank, tolerance)
            errors |= {} if error is None else {path: error}
    replaced = _find_replaced(*views)
    biases = {} if rank is None and tolerance is None else _separate_biases(changes, *views)
    if not changes and not replaced and not biases:
        raise AdapterError(
            "the two models have the same weights, so that there is nothing to extract",
            next_step="give the fine-tuned model first, and then its base",
        )
    if not name:
        given = tuned if isinstance(tuned, str | os.PathLike) else ""
        name = Path(str(parse_name(given) or given)).name or "extracted"
    modules = dict.fromkeys(module for module in (key.rpartition(".")[0] for key in replaced) if module)
    parameters = tuple(path for path in changes if views[1].sites[path].kind is SiteKind.MATRIX)
    like = LoRA(parameters=parameters, modules_to_save=tuple(modules), bias="all" if biases else "none")
    made = hold_changes(name, changes, like=like, replaced=replaced | biases)
    made.provenance |= {"errors": errors, LAYOUT: {path: site_to_json(views[1].sites[path]) for path in changes}}
    return made


def _open(given: Checkpoint, role: str) -> ModelView:
    if not isinstance(given, str | os.PathLike):
        return ModelView.of(given)
    return StoredModel.open(find_source(given, f"the {role} model of lorac.extract", FormatError, "unreadable")).view


def _weighted_sites(view: ModelView) -> dict[str, Site]:
    return {path: site for path, site in view.sites.items() if site.weight and site.kind not in KINDS_WITHOUT_WEIGHT}


def _check_alike(tuned: ModelView, base: ModelView) -> None:
    """Refuse two models that differ in layers or their sizes, or have quantised weights."""
    own, other = _weighted_sites(tuned), _weighted_sites(base)
    for path in [*other, *own]:
        if path not in own or path not in other:
            which, known = ("tuned", own) if path not in own else ("base", other)
            raise missing_site_error(
                f"the {which} model has no layer '{path}', which the other has",
                nearest=nearest_name(path, known),
                next_step="give two checkpoints of one class of model",
            )
        sides = (("tuned", own[path]), ("base", other[path]))
        quantised = [which for which, site in sides if site.packed or site.dtype.itemsize < 2]
        if quantised:
            raise unmergeable_error(
                f"the weight of '{path}' of the {quantised[0]} model is quantised, and has no exact difference",
                next_step="give the models as they were before quantisation",
            )
        differ = own[path].kernel != other[path].kernel
        if differ or (own[path].bias is None) != (other[path].bias is None):
            shapes = [tuple(view.tensor(str(view.sites[path].weight)).shape) for view in (tuned, base)]
            words = (
                differ
                and shapes[0][1:] == shapes[1][1:]
                and (other[path].kind is SiteKind.EMBEDDING or path in base.output_layers)
            )
            raise shape_error(
                f"'{path}' has shape {shapes[0]} in the tuned model and {shapes[1]} in the base"
                + ("" if differ else ", and only one of them has a bias"),
                next_step="give the base that it was tuned from"
                + ("; resize_token_embeddings makes the vocabulary of one that of the other" if words else ""),
            )


def _iter_differences(tuned: ModelView, base: ModelView) -> Iterator[tuple[str, Change]]:
    """Yield the changes of the sites that differ; only the tensors of one site are in memory."""
    for path, site in _weighted_sites(base).items():
        delta = _subtract(tuned.base.weight(tuned.sites[path]), base.base.weight(site))
        shift = _subtract(tuned.base.bias(tuned.sites[path]), base.base.bias(site))
        found = {name: part for name, part in (("weight", delta), ("bias", shift)) if part is not None}
        check_finite({f"{path}.{name}": part for name, part in found.items()}, "the difference of the models")
        if delta is not None:
            yield path, Delta(delta, shift)
        elif shift is not None:
            rows, columns = site.out_features, site.in_features
            yield (
                path,
                LowRank(shift.new_zeros(*site.stacked, columns, 0), shift.new_zeros(*site.stacked, 0, rows), e=shift),
            )


def _subtract(tuned: Tensor | None, base: Tensor | None) -> Tensor | None:
    """Return the difference in float32 or a wider dtype; None if it is zero, or if a tensor is None."""
    if tuned is None or base is None:
        return None
    wide = torch.promote_types(torch.promote_types(tuned.dtype, base.dtype), torch.float32)
    delta = tuned.to(wide) - base.to(wide)
    return delta if bool(delta.any()) else None


def _truncate(path: str, change: Change, rank: int | None, tolerance: float | None) -> tuple[Change, float | None]:
    """Return the nearest pair to a change, and its error; without rank and tolerance, the change."""
    if rank is None and tolerance is None:
        return change, None
    if not isinstance(change, Delta):
        assert isinstance(change, LowRank)
        (*stack, columns, _), rows = change.a.shape, change.b.shape[-1]
        return LowRank(change.a.new_zeros(*stack, columns, 1), change.b.new_zeros(*stack, 1, rows), e=change.e), 0.0
    cut = truncate_matrix(change.delta, rank, tolerance or 0.0)
    if rank is not None and tolerance is not None:
        check_error("the tuned model", path, cut.rank, cut.error, tolerance)
    return LowRank(cut.a.mT, cut.b.mT, e=change.e), cut.error


def _separate_biases(changes: dict[str, Change], tuned: ModelView, base: ModelView) -> dict[str, Tensor]:
    """Remove the changes of biases if an embedding changes too; return the tuned biases by name.

    A LoRA with ``lora_bias`` has a bias at all of its layers, and PEFT has none at an embedding.
    """
    shifted = [path for path, change in changes.items() if change.e is not None]
    if not shifted or all(base.sites[path].kind is not SiteKind.EMBEDDING for path in changes):
        return {}
    biases = {}
    for path in shifted:
        change, bias = changes[path], tuned.base.bias(tuned.sites[path])
        assert isinstance(change, LowRank)
        assert bias is not None
        biases[str(base.sites[path].bias)] = bias.detach().clone()
        if change.b.any():
            changes[path] = replace(change, e=None)
        else:
            del changes[path]
    return biases


def _find_replaced(tuned: ModelView, base: ModelView) -> dict[str, Tensor]:
    """Return the tensors that belong to no site and differ, and all parameters of the modules that own them."""
    at_sites = {name for site in _weighted_sites(base).values() for name in (site.weight, site.bias)}
    at_sites |= {name for site in _weighted_sites(tuned).values() for name in (site.weight, site.bias)}
    own, other = ({*(view.stored or view.module.state_dict())} - at_sites for view in (tuned, base))
    found = {}
    for name in sorted(own | other):
        present = name in own and name in other
        tensors = [view.tensor(name) for view in (tuned, base)] if present else []
        if not present or tensors[0].shape != tensors[1].shape:
            raise shape_error(
                f"the tensor '{name}' of one of the models is missing in the other, or has another shape there",
                next_step="give the base that the model was tuned from",
            )
        if not torch.equal(tensors[0], tensors[1].to(tensors[0].dtype)):
            found[name] = tensors[0].detach().clone()
    whole = {name.rpartition(".")[0] for name in found}
    parameters = {name for name, _ in base.module.named_parameters()}
    for name in sorted((own & other & parameters) - found.keys()):
        if name.rpartition(".")[0] in whole - {""}:
            found[name] = tuned.tensor(name).detach().clone()
    check_finite(found, "the tuned model")
    return found
