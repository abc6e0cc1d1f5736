"""A PEFT file against its own configuration, and against the model it is meant for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lorac.adapters.base_hash import copy_mismatch_error
from lorac.adapters.fit import check_adapter, check_replaced, no_site_error
from lorac.errors import AdapterError, FormatError, warn
from lorac.formats._site_layouts import same_layout
from lorac.formats.peft.config import ALL_LINEAR
from lorac.formats.peft.keys import FileContents, copied_module, embedding_modules, is_saved
from lorac.formats.peft.peft_type import PeftType
from lorac.frontend.model_view import ModelView
from lorac.ir.patterns import no_match_error, select_sites
from lorac.ir.sites import Site, SiteKind
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant

Tensor = torch.Tensor


def check_against_config(
    adapter: Adapter, told: Mapping[str, Site], values: Mapping[str, Any], method: PeftType
) -> None:
    """Without a model: every site of the file is one that its configuration targets.

    Raises:
        FormatError: There is no site at all.
        FormatError: A site is not targeted: PEFT would ignore its tensors in silence.
    """
    if not told and not _copies(adapter):
        raise FormatError(f"the file of adapter '{adapter.name}' holds no tensor of its method", code="corrupt_file")
    _only_targeted(adapter, told, select_targets(adapter.variant, told), values, method)


def check_against_model(
    adapter: Adapter,
    told: Mapping[str, Site],
    values: Mapping[str, Any],
    method: PeftType,
    contents: FileContents,
    model: nn.Module,
) -> dict[str, Site]:
    """With a model: sites, shapes, saved modules and copies of the base are the model's.

    Embeddings saved whole become replacements where they are not the base's own.

    Returns:
        The model's sites.

    Raises:
        SiteError, AdapterError: As `check_adapter`.
        FormatError: The configuration promises tensors that the file lacks.
        FormatError: A site is not targeted.
        FormatError: A saved module computes its weight at each call.
    """
    view = ModelView.of(model)
    sites = view.sites
    wanted = select_targets(adapter.variant, sites, model)
    strange = [no_site_error(adapter.name, path, view) for path in told if path not in sites]
    strange.sort(key=lambda error: error.code != "site_unsupported")
    if not wanted and not _copies(adapter) and not (strange and strange[0].code == "site_unsupported"):
        raise no_match_error(adapter.name, adapter.variant.all_targets, sites)
    if strange:
        raise strange[0]
    _only_targeted(adapter, {path: sites[path] for path in told}, wanted, values, method, by_weight=True)
    known = view.named_tensors()
    _refuse_computed(adapter, known)
    _complete(adapter, wanted, model)
    for name, tensor in contents.whole.items():
        check_replaced(adapter.name, name, tensor, known)
        if not _equal(tensor, known[name]):
            adapter.replaced[name] = tensor
    check_adapter(adapter, view)
    for path, site in told.items():
        if (method.lays_out and not same_layout(site, sites[path])) or site.within not in {None, sites[path].within}:
            raise _other_layout(adapter, site, sites[path])
        if sites[path].within not in {site.within, path}:
            _warn_unrun(adapter, sites[path])
        method.check_site(sites[path], adapter.tensors[path])
    _same_copies(adapter, contents.copies, known)
    return dict(sites)


def select_targets(variant: Variant, sites: Mapping[str, Site], model: nn.Module | None = None) -> list[str]:
    """Paths of the sites that PEFT would adapt.

    Args:
        variant: The method with its targets.
        sites: Where to look.
        model: Tells its output layer, which "all-linear" leaves out.
    """
    targets = variant.targets
    if targets == ALL_LINEAR:
        output = set() if model is None else set(embedding_modules(model, ["get_output_embeddings"]))
        # PEFT means modules that are linear layers: not an attention, whose site is a matrix within it.
        layers = (p for p, s in sites.items() if s.kind is SiteKind.LINEAR and s.within != p)
        targets = tuple(p for p in layers if p not in output)
    found = select_sites(
        sites,
        targets,
        parameters=variant.parameters,
        exclude=variant.exclude,
        layers=variant.layers,
        layers_pattern=variant.layers_pattern,
        saved=variant.modules_to_save,
    )
    return [site.path for site in found if site.kind in variant.kinds and variant.adapts(site)]


def saved_parameter_names(variant: Variant, model: nn.Module) -> list[str]:
    """Every parameter and buffer that PEFT saves for modules_to_save, or as part of a copied module."""
    every = model.state_dict(keep_vars=True)
    return [name for name in every if is_saved(name, variant.modules_to_save) or copied_module(variant, name)]


def tie_to_embedding(adapter: Adapter, path: str, sites: Mapping[str, Site], method: PeftType) -> str | None:
    """Make a tied site's tensors those of the embedding it is tied to (`Method.tied_to`), if they are.

    Returns:
        The embedding's path, or None.
    """
    own = adapter.tensors[path]
    for other, at in adapter.tensors.items():
        crossed = method.tied_to(at) if sites[other].kind is SiteKind.EMBEDDING else {}
        if crossed and contains_tensors(own, crossed):
            own |= crossed
            return other
    return None


def contains_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Whether among the tensors are these, value for value."""
    return all(name in tensors and torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def _copies(adapter: Adapter) -> bool:
    """Whether the adapter holds a copy of a module that its method trains whole."""
    return any(copied_module(adapter.variant, name) for name in adapter.replaced)


def _only_targeted(
    adapter: Adapter,
    sites: Mapping[str, Site],
    wanted: Iterable[str],
    values: Mapping[str, Any],
    method: PeftType,
    *,
    by_weight: bool = False,
) -> None:
    """Every site is targeted, or tied to an embedding that is; by value alone, or by weight too."""
    wanted = set(wanted)
    for path in adapter.tensors:
        if path in wanted or path in adapter.provenance["tied"]:
            continue
        source = tie_to_embedding(adapter, path, sites, method) if values.get("ensure_weight_tying") else None
        if source and (not by_weight or path in sites[source].shares):
            adapter.provenance["tied"][path] = source
            continue
        raise FormatError(
            f"adapter '{adapter.name}' has tensors for '{path}', which its configuration does not "
            "target, so that PEFT would ignore them",
            next_step="target_modules, exclude_modules, layers_to_transform and modules_to_save "
            "must be those of the training"
            + (
                "; under ensure_weight_tying a tied site holds its embedding's tensors, transposed"
                if values.get("ensure_weight_tying")
                else ""
            ),
            code="unused_tensors",
        )


def _refuse_computed(adapter: Adapter, known: Iterable[str]) -> None:
    """Refuse what a saved module computes its weight from at each call: a program holds what comes of it."""
    known = set(known)
    for name in adapter.replaced.keys() - known:
        owner = name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
        if f"{owner}.weight" in known - adapter.replaced.keys():
            raise FormatError(
                f"adapter '{adapter.name}' trains '{name}', from which '{owner}' computes its weight at each call; the "
                "model as compiled has that weight alone",
                next_step="after training, remove the parametrization (torch.nn.utils.parametrize."
                "remove_parametrizations, remove_weight_norm) in the model that PEFT saves, and in this one",
                code="unsupported_field",
            )


def _complete(adapter: Adapter, wanted: Iterable[str], model: nn.Module) -> None:
    """Every targeted site and every saved module is in the file."""
    lacking = [path for path in wanted if path not in adapter.tensors]
    lacking += [n for n in saved_parameter_names(adapter.variant, model) if n not in adapter.replaced]
    if lacking:
        listed = ", ".join(f"'{name}'" for name in lacking[:5])
        more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
        raise FormatError(
            f"the file of adapter '{adapter.name}' lacks tensors that its configuration promises "
            f"for this model: {listed}{more}",
            next_step="it is incomplete, or was made for a smaller model",
            code="corrupt_file",
        )


def _same_copies(adapter: Adapter, copies: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> None:
    """Copies of the base are the model's own values, as far as the coarser of two dtypes can tell."""
    for name, tensor in copies.items():
        check_replaced(adapter.name, name, tensor, known)
        if not _equal(tensor, known[name]):
            raise copy_mismatch_error(adapter.name, name)


def _warn_unrun(adapter: Adapter, site: Site) -> None:
    warn(
        f"adapter '{adapter.name}' has tensors for '{site.path}', whose weight '{site.within}' reads itself: PEFT runs "
        "them only once they are merged, and never trains them; what is computed here is the merged weight's",
        next_step=f"target '{site.within}' in PEFT, which adapts all of it",
    )


def _equal(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other.to(one.device))
    coarse = max(one.dtype, other.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return torch.equal(one.to(coarse), other.detach().to(one.device, coarse))


def _other_layout(adapter: Adapter, told: Site, site: Site) -> AdapterError:
    def words(found: Site) -> str:
        groups = f" in {found.conv.groups} groups" if found.conv and found.conv.groups > 1 else ""
        return f"{found.kind} {found.kernel}{groups}"

    return AdapterError(
        f"adapter '{adapter.name}' holds tensors for a {words(told)} at '{site.path}', which is a {words(site)}",
        next_step="load the class of model that the adapter was trained on",
        code="shape_mismatch",
    )
