"""PEFT's folders: adapter_config.json with adapter_model.safetensors or adapter_model.bin.

The PEFT types are the modules of `types`; the rest is the same for all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorac.adapters.base_hash import compute_tensor_hash
from lorac.adapters.fit import check_present, check_site, no_site_error, sort_by_site
from lorac.errors import BaseNeeded, FormatError
from lorac.formats._files import HUB_WEIGHTS, check_seal, read_json, read_pickle, read_safetensors
from lorac.formats._format import Format
from lorac.formats._site_layouts import LAYOUT, site_to_json
from lorac.formats.peft import target_parameters as matrices
from lorac.formats.peft.checks import check_against_config, check_against_model, contains_tensors
from lorac.formats.peft.config import peft_type_of, read_config, variant_of
from lorac.formats.peft.keys import FileContents, read_keys
from lorac.formats.peft.peft_type import PeftType
from lorac.formats.peft.token_rows import fill_rows, refuse_adapted_rows
from lorac.formats.peft.writer import BASE, CONFIG, WEIGHTS, seal_text, write_folder
from lorac.frontend.model_view import ModelView
from lorac.ir.sites import Site
from lorac.variants.adapter import Adapter

_PICKLED = "adapter_model.bin"


def _folder(path: Path) -> Path:
    """The folder, given itself or one of its files."""
    return path.parent if path.name in (CONFIG, WEIGHTS, _PICKLED) and path.is_file() else path


def _recognises(path: Path) -> bool:
    folder = _folder(path)
    others = any((folder / name).is_file() for name in HUB_WEIGHTS)
    return (folder / CONFIG).is_file() and ((folder / WEIGHTS).is_file() or not others)


def _load(path: Path, model: nn.Module | None, name: str | None) -> Adapter:
    folder = _folder(path)
    file = folder / CONFIG
    raw = read_json(file)
    tensors, metadata = _weights(folder)
    check_seal(folder, seal_text(raw, metadata), tensors, metadata)
    method, name = peft_type_of(raw, file), name or folder.resolve().name
    values = read_config(raw, method, file)
    if method.read_whole is not None:
        adapter = method.read_whole(folder, values, tensors, name, model)
        adapter.provenance |= {"format": "peft", "config": raw}
        return adapter
    return _of_sites(folder, raw, method, values, tensors, metadata.get(BASE), name, model)


def _of_sites(
    folder: Path,
    raw: dict[str, Any],
    method: PeftType,
    values: Mapping[str, Any],
    weights: dict[str, torch.Tensor],
    base: str | None,
    name: str,
    model: nn.Module | None,
) -> Adapter:
    """The adapter of a file that holds tensors of sites."""
    file = folder / CONFIG
    contents = read_keys(weights, method, values, model)
    _spread(name, method, contents, model)
    own = matrices.take_matrices(name, contents, values.get("target_parameters") or (), model)
    variant = method.settled(variant_of(values, method, file), contents.sites)
    if values["target_modules"] is None:  # PEFT's own choice for the architecture: it is in the keys
        variant = dataclasses.replace(variant, targets=tuple(contents.sites))
    adapter = Adapter(
        name=name,
        variant=variant,
        replaced=contents.replaced,
        provenance={
            "format": "peft",
            "source": str(folder),
            "config": raw,
            "base": base,
            "tied": contents.tied,
        },
    )
    refuse_adapted_rows(adapter.name, contents.rows, contents.sites)
    adapter.replaced |= fill_rows(adapter.name, contents.rows, values, model)
    contents.shared = _shared(adapter, method, contents, values, model)
    told = _sites(adapter, method, contents, values, model) | _matrices(adapter, own, model)
    if model is None:
        check_against_config(adapter, told, values, method)
        adapter.replaced |= contents.whole
        adapter.provenance["copies"] = {n: compute_tensor_hash(t) for n, t in contents.copies.items()}
        known = told
    else:
        known = check_against_model(adapter, told, values, method, contents, model)
    adapter.tensors = sort_by_site(adapter.tensors, None if model is None else ModelView.of(model))
    adapter.provenance[LAYOUT] = {path: site_to_json(known[path]) for path in adapter.tensors}
    return method.begun(adapter, values, model)


def _weights(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors; safetensors before pickles, as PEFT prefers them."""
    if (folder / WEIGHTS).is_file():
        return read_safetensors(folder / WEIGHTS)
    if (folder / _PICKLED).is_file():
        return read_pickle(folder / _PICKLED), {}
    raise FormatError(
        f"'{folder}' has {CONFIG}, but neither {WEIGHTS} nor {_PICKLED}",
        next_step="copy or download the whole folder",
        code="corrupt_file",
    )


def _sites(
    adapter: Adapter, method: PeftType, contents: FileContents, values: Mapping[str, Any], model: nn.Module | None
) -> dict[str, Site]:
    """Fill in the adapter's tensors; return its sites as far as the file tells them."""
    told = {}
    sites = ModelView.of(model).sites if method.make_site and model is not None else {}
    for path, stored in contents.sites.items():
        site, tensors = method.read_site(adapter.variant, path, {**stored, **contents.shared})
        site = dataclasses.replace(site, within=contents.within.get(path))
        if site.within not in {None, path}:
            tensors = method.read_inner(values, tensors)
        if method.make_site is not None:
            site = _known(adapter, method, path, sites, model)
            tensors = method.make_site(adapter.variant.at(site), site, tensors)
        adapter.tensors[path] = tensors
        check_site(adapter.name, adapter.variant, site, tensors)
        told[path] = site
    return told


def _spread(adapter: str, method: PeftType, contents: FileContents, model: nn.Module | None) -> None:
    """Give layers that are tied to one of the file's the tensors of that; what the file has of them is the same."""
    tied = method.spread(contents.sites, ModelView.of(model).sites) if method.spread and model is not None else {}
    for path, source in tied.items():
        here, there = contents.sites.get(path), contents.sites[source]
        if here is not None and not contains_tensors(here, there):
            raise FormatError(
                f"adapter '{adapter}' has other tensors for '{path}' than for '{source}', which it is tied to",
                next_step="load the base model that the adapter was trained on",
                code="corrupt_file",
            )
        contents.sites[path], contents.tied[path] = there, source


def _matrices(adapter: Adapter, own: Mapping[str, dict[str, torch.Tensor]], model: nn.Module | None) -> dict[str, Site]:
    """Fill in the adapter's tensors of matrices that modules multiply by themselves; return their sites."""
    sites = ModelView.of(model).sites if own and model is not None else {}
    for path, tensors in own.items():
        check_site(adapter.name, adapter.variant, sites[path], tensors)
        adapter.tensors[path] = tensors
    return {path: sites[path] for path in own}


def _known(adapter: Adapter, method: PeftType, path: str, sites: Mapping[str, Site], model: nn.Module | None) -> Site:
    """The model's site at a path, for files that mean nothing without it."""
    if model is None:
        raise BaseNeeded(
            f"a file of peft_type {method.peft_type} does not tell the shapes of adapter '{adapter.name}'",
            next_step="pass model=",
        )
    if path not in sites:
        raise no_site_error(adapter.name, path, ModelView.of(model))
    return sites[path]


def _shared(
    adapter: Adapter, method: PeftType, contents: FileContents, values: Mapping[str, Any], model: nn.Module | None
) -> dict[str, torch.Tensor]:
    """The tensors that all sites have in common, from the file or from the seed it names."""
    missing = [name for name in method.shared if name not in contents.shared]
    if not missing:
        return contents.shared
    made: dict[str, torch.Tensor] = {}
    if method.make_shared is not None:
        sites = ModelView.of(model).sites if model is not None else {}
        strange = [path for path in contents.sites if path not in sites]
        if strange and model is not None:
            raise no_site_error(adapter.name, strange[0], ModelView.of(model))
        # What the configuration promises is held against the file before anything of that size is made.
        for path in sites.keys() & contents.sites.keys():
            check_present(adapter.name, adapter.variant, sites[path], contents.sites[path])
        made = method.make_shared(values, [sites[path] for path in contents.sites if path in sites])
    if not set(missing) <= made.keys():
        raise FormatError(
            f"the file of adapter '{adapter.name}' lacks '{missing[0]}', which all its sites have in common",
            next_step="save the adapter again, with save_projection=True where its configuration has that",
            code="corrupt_file",
        )
    return {**made, **contents.shared}


FORMAT = Format(
    name="peft",
    looks_for=f"a folder with {CONFIG}",
    recognises=_recognises,
    load=_load,
    save=write_folder,
)
