"""PEFT's folders: adapter_config.json with adapter_model.safetensors or adapter_model.bin.

The PEFT types are the modules of this package that define `METHOD`; the rest is the same for all.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

from lorac.errors import CorruptFile
from lorac.formats._files import read_json, read_pickle, read_safetensors
from lorac.formats._fit import check_site, in_order
from lorac.formats._format import Format
from lorac.formats._hash import tensor_hash
from lorac.formats._layout import LAYOUT, describe
from lorac.formats.peft.checks import against_itself, against_model
from lorac.formats.peft.config import method_of, read_config, variant_of
from lorac.formats.peft.keys import Contents, read_keys
from lorac.formats.peft.method import Method
from lorac.formats.peft.save import BASE, CONFIG, WEIGHTS, save
from lorac.ir.sites import Site
from lorac.variants.base import Adapter

_PICKLED = "adapter_model.bin"


def _folder(path: Path) -> Path:
    """The folder, given itself or one of its files."""
    return path.parent if path.name in (CONFIG, WEIGHTS, _PICKLED) and path.is_file() else path


def _recognises(path: Path) -> bool:
    return (_folder(path) / CONFIG).is_file()


def _load(path: Path, model: nn.Module | None, name: str | None) -> Adapter:
    folder = _folder(path)
    described = folder / CONFIG
    raw = read_json(described)
    method = method_of(raw, described)
    values = read_config(raw, method, described)
    tensors, metadata = _weights(folder)
    contents = read_keys(tensors, method, values, model)
    variant = variant_of(values, method, described)
    if values["target_modules"] is None:  # PEFT's own choice for the architecture: it is in the keys
        variant = dataclasses.replace(variant, targets=tuple(contents.sites))
    adapter = Adapter(
        name=name or folder.resolve().name,
        variant=variant,
        replaced=contents.replaced,
        provenance={
            "format": "peft",
            "source": str(folder),
            "config": raw,
            "base": metadata.get(BASE),
            "tied": contents.tied,
        },
    )
    told = _sites(adapter, method, contents)
    if model is None:
        against_itself(adapter, told, values)
        adapter.replaced |= contents.whole
        adapter.provenance["copies"] = {n: tensor_hash(t) for n, t in contents.copies.items()}
        known = told
    else:
        known = against_model(adapter, told, values, method, contents, model)
    adapter.tensors = in_order(adapter.tensors, model)
    adapter.provenance[LAYOUT] = {path: describe(known[path]) for path in adapter.tensors}
    return adapter


def _weights(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors; safetensors before pickles, as PEFT prefers them."""
    if (folder / WEIGHTS).is_file():
        return read_safetensors(folder / WEIGHTS)
    if (folder / _PICKLED).is_file():
        return read_pickle(folder / _PICKLED), {}
    raise CorruptFile(
        f"'{folder}' has {CONFIG}, but neither {WEIGHTS} nor {_PICKLED}",
        next_step="copy or download the whole folder",
    )


def _sites(adapter: Adapter, method: Method, contents: Contents) -> dict[str, Site]:
    """Fill in the adapter's tensors; return its sites as far as the file tells them."""
    told = {}
    for path, stored in contents.sites.items():
        site, adapter.tensors[path] = method.read_site(adapter.variant, path, stored)
        check_site(adapter.name, adapter.variant, site, adapter.tensors[path])
        told[path] = site
    return told


FORMAT = Format(
    name="peft",
    looks_for=f"a folder with {CONFIG}",
    recognises=_recognises,
    load=_load,
    save=save,
)
