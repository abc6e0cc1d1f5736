"""Checks of a PEFT file against its own configuration, and against the base model."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lorac.adapters.base_hash import copy_mismatch_error
from lorac.adapters.fit import check_adapter, check_replaced, no_site_error
from lorac.errors import list_some, shape_error, unused_error, warn
from lorac.formats._config_fields import ALL_LINEAR
from lorac.formats._errors import corrupt_error, unsupported_error
from lorac.formats._site_layouts import same_layout
from lorac.formats.peft.keys import PeftFile, copied_module, is_saved
from lorac.frontend.model_view import ModelView
from lorac.ir.sites.patterns import no_match_error, select_sites
from lorac.ir.sites.site import Site, SiteKind
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant


def check_against_config(adapter: Adapter, file: PeftFile, sites: Mapping[str, Site]) -> None:
    """Check that the configuration targets every site of a file.

    Raises:
        FormatError: the file has no sites, or has an untargeted site, whose tensors PEFT would silently ignore.
    """
    if not sites and not _has_copied_module(adapter):
        raise corrupt_error(f"the file of adapter '{adapter.name}' holds no tensor of its method")
    _refuse_untargeted(adapter, file, sites, select_targets(adapter.variant, sites))


def check_against_model(adapter: Adapter, file: PeftFile, sites: Mapping[str, Site], view: ModelView) -> None:
    """Check that sites, shapes, saved modules and copies of the base agree with the model.

    Saved embeddings become replacements where they differ from the base's.

    Raises:
        SiteError, AdapterError: as ``check_adapter``.
        FormatError: the file lacks tensors that the configuration requires; a site is not targeted; or a saved module
            computes its weight at each call.
    """
    targets = select_targets(adapter.variant, view.sites, view)
    errors = [no_site_error(adapter.name, path, view) for path in sites if path not in view.sites]
    errors.sort(key=lambda error: error.code != "site_unsupported")
    if not targets and not _has_copied_module(adapter) and not (errors and errors[0].code == "site_unsupported"):
        raise no_match_error(adapter.name, adapter.variant.all_targets, view.sites)
    if errors:
        raise errors[0]
    _refuse_untargeted(adapter, file, {path: view.sites[path] for path in sites}, targets, by_weight=True)
    contents = file.contents
    named = view.named_tensors() if adapter.replaced or contents.embeddings or contents.copies else {}
    _refuse_computed_weights(adapter, set(named))
    lacking = [path for path in targets if path not in adapter.tensors]
    lacking += [name for name in saved_parameter_names(adapter.variant, view) if name not in adapter.replaced]
    if lacking:
        raise corrupt_error(
            f"the file of adapter '{adapter.name}' lacks tensors that its configuration promises for this model: "
            f"{list_some(lacking)}",
            next_step="give the whole file, or the model that it was made for",
        )
    resizable = view.list_resizable({**adapter.replaced, **contents.embeddings, **contents.copies})
    for name, tensor in contents.embeddings.items():
        check_replaced(adapter.name, name, tensor, named, resizable)
        if not _is_same_value(tensor, view.as_given(name, view.tensor(name))):
            adapter.replaced[name] = tensor
    check_adapter(adapter, view)
    for path, stored in sites.items():
        site = view.sites[path]
        fits = same_layout(stored, site) or not file.peft_type.shapes_tell_kind
        if not fits or stored.within not in {None, site.within}:
            kinds = [
                f"{one.kind} {one.kernel}"
                + (f" in {one.conv.groups} groups" if one.conv and one.conv.groups > 1 else "")
                for one in (stored, site)
            ]
            raise shape_error(
                f"adapter '{adapter.name}' has tensors of a {kinds[0]} for '{path}', which is a {kinds[1]}",
                next_step="load the class of model that the adapter was trained on",
            )
        if site.within not in {stored.within, path}:
            warn(
                f"adapter '{adapter.name}' has tensors for '{path}', and '{site.within}' reads that weight itself: "
                "PEFT runs them only merged and never trains them, and lorac computes with the merged weight",
                next_step=f"target '{site.within}' in PEFT, which adapts all of it",
            )
        file.peft_type.check_site(site, adapter.tensors[path])
    for name, tensor in contents.copies.items():
        check_replaced(adapter.name, name, tensor, named, resizable)
        own = view.as_given(name, view.tensor(name))  # rows of added tokens are not in the model
        if not _is_same_value(tensor[: len(own)] if name in adapter.replaced else tensor, own):
            raise copy_mismatch_error(adapter.name, name)


def select_targets(variant: Variant, sites: Mapping[str, Site], view: ModelView | None = None) -> list[str]:
    """Return the paths of the sites that PEFT would adapt.

    Args:
        view: the base, whose output layer "all-linear" excludes.
    """
    targets = variant.targets
    if targets == ALL_LINEAR:
        output = set() if view is None else set(view.output_layers)
        # "all-linear" selects modules that are linear layers; an attention is none, though its site is a matrix.
        layers = (p for p, s in sites.items() if s.kind is SiteKind.LINEAR and s.within != p)
        targets = tuple(p for p in layers if p not in output)
    selected = select_sites(
        sites,
        targets,
        parameters=variant.parameters,
        exclude=variant.exclude,
        layers=variant.layers,
        layers_pattern=variant.layers_pattern,
        saved=variant.modules_to_save,
    )
    return [site.path for site in selected if site.kind in variant.kinds and variant.adapts(site)]


def saved_parameter_names(variant: Variant, view: ModelView) -> list[str]:
    """Return the parameters and buffers that PEFT saves for modules_to_save or for copied modules."""
    if not variant.modules_to_save and type(variant).replaces_module is Variant.replaces_module:
        return []
    names = view.module.state_dict(keep_vars=True)
    return [name for name in names if is_saved(name, variant.modules_to_save) or copied_module(variant, name)]


def _has_copied_module(adapter: Adapter) -> bool:
    return any(copied_module(adapter.variant, name) for name in adapter.replaced)


def _refuse_untargeted(
    adapter: Adapter, file: PeftFile, sites: Mapping[str, Site], targets: Iterable[str], *, by_weight: bool = False
) -> None:
    """Refuse a site neither targeted nor tied to an adapted embedding; ``by_weight`` requires a shared weight too."""
    targets, ties = set(targets), bool(file.values.get("ensure_weight_tying"))
    for path in adapter.tensors:
        if path in targets or path in adapter.provenance["tied"]:
            continue
        source = None
        for other, embedding in adapter.tensors.items() if ties else ():  # a site tied to it shares its tensors
            shared = file.peft_type.tied_tensors(embedding) if sites[other].kind is SiteKind.EMBEDDING else {}
            if shared and file.peft_type.holds_tied(adapter.tensors[path], embedding):
                source = other
                adapter.tensors[path] |= shared
                break
        if source and (not by_weight or path in sites[source].shares):
            adapter.provenance["tied"][path] = source
            continue
        raise unused_error(
            f"adapter '{adapter.name}' has tensors for '{path}', which its configuration does not target, so that PEFT "
            "would ignore them",
            next_step="target_modules, exclude_modules, layers_to_transform and modules_to_save must be those of the "
            "training"
            + ("; under ensure_weight_tying a tied site holds its embedding's tensors, transposed" if ties else ""),
        )


def _refuse_computed_weights(adapter: Adapter, names: set[str]) -> None:
    """Refuse tensors from which a saved module computes its weight at each call; a program has the weight only."""
    for name in sorted(adapter.replaced.keys() - names):
        owner = name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
        if f"{owner}.weight" in names - adapter.replaced.keys():
            raise unsupported_error(
                f"adapter '{adapter.name}' trains '{name}', and '{owner}' computes its weight from it at each call; a "
                "compiled model has only the weight",
                next_step="after training, remove the parametrization (torch.nn.utils.parametrize."
                "remove_parametrizations, remove_weight_norm) in the model that PEFT saves, and in this one",
            )


def _is_same_value(tensor: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal in the coarser of their dtypes."""
    if not tensor.is_floating_point():
        return torch.equal(tensor, other.to(tensor.device))
    coarse = max(tensor.dtype, other.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return torch.equal(tensor.to(coarse), other.detach().to(tensor.device, coarse))
