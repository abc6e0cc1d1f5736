"""Reading a PEFT folder: every tensor and every field must be covered."""

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from lorac.adapters.base_hash import compute_tensor_hash
from lorac.adapters.fit import check_present, check_site, no_site_error, sort_by_site
from lorac.errors import BaseNeeded
from lorac.formats._config_fields import BASE_HASH, read_fields
from lorac.formats._errors import corrupt_error
from lorac.formats._site_layouts import LAYOUT, site_to_json
from lorac.formats.peft.checks import check_against_config, check_against_model, select_targets
from lorac.formats.peft.config import peft_type_of, variant_of
from lorac.formats.peft.keys import PeftFile, read_keys
from lorac.formats.peft.peft_type import AnyPeftType, contains_tensors
from lorac.formats.peft.target_parameters import take_matrices
from lorac.formats.peft.token_rows import fill_rows
from lorac.formats.peft.writer import CONFIG, WEIGHTS, seal_text
from lorac.formats.reading import AdapterFile
from lorac.frontend.model_view import ModelView
from lorac.ir.sites.site import Site
from lorac.variants.adapter import Adapter

PICKLED, MODEL_CONFIG = "adapter_model.bin", "config.json"


def read_folder(folder: AdapterFile, view: ModelView | None, name: str | None) -> Adapter:
    """Return the adapter of a PEFT folder.

    Args:
        name: the name of the adapter; None for the name of the folder.

    Raises:
        FormatError, AdapterError, SiteError: as ``load_adapter``.
        BaseNeeded: the file cannot be read without the model.
    """
    config, name = folder.inside(CONFIG), name or folder.adapter_name
    raw, path = config.read_json(), config.path
    weights = folder.choose(WEIGHTS, PICKLED)
    tensors, metadata = weights.read_tensors(), weights.metadata
    weights.check_seal(seal_text(raw, metadata), tensors)
    peft_type = peft_type_of(raw, path)
    values = read_fields(raw, peft_type.fields, path)
    adapter = peft_type.read_folder(folder, values, tensors, name, view)
    if adapter is not None:
        adapter.provenance |= {"format": "peft", "config": raw}
        return adapter
    contents = read_keys(tensors, peft_type, values, view)
    file = PeftFile(name, peft_type, values, contents, view)
    for tied, source in peft_type.find_tied_sites(contents.sites, file.sites).items():
        if tied in contents.sites and not contains_tensors(contents.sites[tied], contents.sites[source]):
            raise corrupt_error(
                f"adapter '{name}' has different tensors for '{tied}' and '{source}', which are tied",
                next_step="load the base model that the adapter was trained on",
            )
        contents.sites[tied], contents.tied[tied] = contents.sites[source], source
    matrices = take_matrices(file)
    variant = variant_of(values, peft_type, path)
    if peft_type.names_no_site and not contents.sites and contents.shared:
        if view is None:
            raise _shapes_needed(peft_type, name)
        contents.sites |= {path: {} for path in select_targets(variant, view.sites, view)}
    variant = peft_type.refine_variant(variant, values, contents.sites)
    variant = variant.for_model(view) if view is not None and peft_type.ordered else variant
    if values["target_modules"] is None:  # PEFT chose targets by the architecture, so the keys name the layers
        variant = dataclasses.replace(variant, targets=tuple(contents.sites))
    model_config = folder.inside(MODEL_CONFIG).read_json() if folder.has(MODEL_CONFIG) else {}
    labels = model_config.get("id2label")
    provenance = {
        "format": "peft",
        "source": str(folder),
        "config": raw,
        "base": metadata.get(BASE_HASH),
        "tied": contents.tied,
        "labels": [str(labels.get(str(i))) for i in range(len(labels))] if isinstance(labels, Mapping) else [],
    }
    adapter = Adapter(name, variant, replaced=contents.replaced, provenance=provenance)
    fill_rows(adapter, file)
    sites = _read_sites(adapter, file, _complete_shared(adapter, file), matrices)
    if view is None:
        check_against_config(adapter, file, sites)
        adapter.replaced |= contents.embeddings
        adapter.provenance["copies"] = {name: compute_tensor_hash(copy) for name, copy in contents.copies.items()}
    else:
        check_against_model(adapter, file, sites, view)
        sites = {path: file.sites[path] for path in adapter.tensors}
    adapter.tensors = sort_by_site(adapter.tensors, view)
    adapter.provenance[LAYOUT] = {path: site_to_json(sites[path]) for path in adapter.tensors}
    return peft_type.undo_start(adapter, values, view)


def _read_sites(
    adapter: Adapter, file: PeftFile, shared: dict[str, Tensor], matrices: dict[str, dict[str, Tensor]]
) -> dict[str, Site]:
    """Add the tensors of a file to the adapter; return the sites that the file shows."""
    peft_type, contents = file.peft_type, file.contents
    sites = {}
    for path, stored in contents.sites.items():
        needed = peft_type.needs_model or type(adapter.variant) in peft_type.completed
        known = _site_of_model(file, path) if needed else None
        site, tensors = peft_type.read_site(adapter.variant, path, {**stored, **shared})
        within = contents.within.get(path)
        site = site if site.within == within else dataclasses.replace(site, within=within)
        if site.within not in {None, path}:
            tensors = peft_type.read_inner(file.values, tensors)
        if known:
            site, view = known
            tensors = peft_type.complete_site(adapter.variant.at(site), site, tensors, view.base)
        adapter.tensors[path] = tensors
        check_site(adapter.name, adapter.variant, site, tensors)
        sites[path] = site
    for path, tensors in matrices.items():
        sites[path] = file.sites[path]
        check_site(adapter.name, adapter.variant, sites[path], tensors)
        adapter.tensors[path] = tensors
    used = {id(tensor) for tensors in adapter.tensors.values() for tensor in tensors.values()}
    groups = {name.partition(".")[2] for name, tensor in shared.items() if id(tensor) in used}
    if unused := [name for name in shared if "." in name and name.partition(".")[2] not in groups]:
        raise corrupt_error(
            f"no site of adapter '{adapter.name}' uses '{unused[0]}'",
            next_step="load the base model that the adapter was trained on",
        )
    return sites


def _site_of_model(file: PeftFile, path: str) -> tuple[Site, ModelView]:
    """Return the model's site at a path, and the model; for types whose files cannot be read without it."""
    if file.view is None:
        raise _shapes_needed(file.peft_type, file.name)
    if path not in file.sites:
        raise no_site_error(file.name, path, file.view)
    return file.sites[path], file.view


def _shapes_needed(peft_type: AnyPeftType, name: str) -> BaseNeeded:
    return BaseNeeded(
        f"a file of peft_type {peft_type.peft_type} does not contain the shapes of adapter '{name}'",
        next_step="pass model=",
    )


def _complete_shared(adapter: Adapter, file: PeftFile) -> dict[str, Tensor]:
    """Return the tensors that all sites share, from the file or drawn from its seed."""
    shared, stored = file.contents.shared, file.contents.sites
    missing = [name for name in file.peft_type.shared if not {name} & {key.partition(".")[0] for key in shared}]
    if not missing:
        return shared
    sites = [] if file.view is None else [_site_of_model(file, path)[0] for path in stored]
    # Sizes in the configuration are compared with the file before tensors of these sizes are allocated.
    for site in sites:
        check_present(adapter.name, adapter.variant, site, stored[site.path])
    if file.values.get("save_projection", True):
        raise corrupt_error(
            f"the file of adapter '{adapter.name}' lacks '{missing[0]}', which all its sites share",
            next_step="save the adapter again, with save_projection=True where its configuration has that",
        )
    if not sites:
        raise BaseNeeded(
            "save_projection=False: the file lacks the tensors of its seed, and their sizes depend on the model",
            next_step="load_adapter(path, model)",
        )
    largest = max(site.out_features for site in sites), max(site.in_features for site in sites)
    drawn = file.peft_type.draw_shared(file.values, *largest)
    return {**dict(zip(file.peft_type.shared, drawn, strict=True)), **shared}
