"""AdapterHub's folders: adapter_config.json with adapter.safetensors or pytorch_adapter.bin.

A key tells the number of a block, and which module of a model that is is found by structure
(`lorac.frontend.residual_stream`): a file means nothing without its model.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

from lorac.adapters.base_hash import compute_base_hash
from lorac.adapters.fit import check_adapter, sort_by_site
from lorac.errors import BaseNeeded, FormatError, warn
from lorac.formats._files import (
    HUB_WEIGHTS,
    SEAL,
    check_seal,
    encode_config,
    read_json,
    read_pickle,
    read_safetensors,
    write_json,
)
from lorac.formats._format import Format
from lorac.formats.adapterhub import bottlenecks, config, keys, layouts
from lorac.formats.adapterhub import lora_writer as saving
from lorac.formats.adapterhub.components import ComponentFile, ModelLayout
from lorac.formats.peft.writer import WEIGHTS as PEFT_WEIGHTS
from lorac.frontend.model_view import ModelView
from lorac.storage.tensor_file import hash_contents, write_safetensors
from lorac.variants.adapter import Adapter
from lorac.variants.bottleneck import Bottleneck
from lorac.variants.union import Union

Tensor = torch.Tensor
CONFIG = "adapter_config.json"
WEIGHTS, _PICKLED = HUB_WEIGHTS
_HEADS = ("model_head.safetensors", "pytorch_model_head.bin")
_INTERFACE = "adapter_interface.json"
_COMPOSED = {
    "adapter_fusion_config.json": "a fusion that attends over several adapters",
    "adapter_setup.json": "how adapters are stacked, fused or run beside each other",
}
"""Files beside which no adapter lies -> what they say."""
_BASE = "lorac_base"


def _folder(path: Path) -> Path:
    """The folder, given itself or one of its files."""
    return path.parent if path.name in (CONFIG, *HUB_WEIGHTS) and path.is_file() else path


def _recognises(path: Path) -> bool:
    folder = _folder(path)
    if _composed(folder) is not None:
        return True
    there = any((folder / name).is_file() for name in HUB_WEIGHTS)
    return there and (folder / CONFIG).is_file() and not (folder / PEFT_WEIGHTS).is_file()


def _composed(folder: Path) -> str | None:
    """The file that makes a folder hold what puts adapters together, and no adapter."""
    if (folder / CONFIG).is_file():
        return None
    return next((name for name in _COMPOSED if (folder / name).is_file()), None)


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def _load(path: Path, model: nn.Module | None, name: str | None) -> Adapter:
    folder = _folder(path)
    composed = _composed(folder)
    if composed is not None:
        raise FormatError(
            f"'{folder / composed}' is AdapterHub's and says {_COMPOSED[composed]}; lorac reads adapters one by one",
            next_step="load each adapter's own folder; lorac.Chain puts methods of the weight form after one another, "
            "and a weighted swap adds what several do",
            code="unsupported_field",
        )
    file = folder / CONFIG
    raw = read_json(file)
    tensors, metadata = _weights(folder)
    check_seal(folder, encode_config(raw), tensors, metadata)
    held = {keys.modern(key): tensor for key, tensor in tensors.items()}
    told, methods = config.read_config(raw, file, invertible=any(layouts.INVERTIBLE in key for key in held))
    family = layouts.family_of(told.model_type, f"'{file}'")
    name = name or folder.resolve().name
    if model is None:
        raise BaseNeeded(
            f"a file of AdapterHub's tells blocks by number: which modules adapter '{name}' is for, its model says",
            next_step="load_adapter(path, model)",
        )
    _tell_beside(folder)
    host = ModelLayout.of(model, family)
    parts = [method.placed(host, name) for method in methods]
    variants = [variant for part in parts for variant in part.variants]
    variant = variants[0] if len(variants) == 1 else Union.of(*variants)
    adapter = Adapter(name, variant, provenance={"format": FORMAT.name, "source": str(folder), "config": raw})
    adapter.provenance["base"] = metadata.get(_BASE)
    found = keys.placed(name, told.name, [place for part in parts for place in part.places], held)
    adapter.tensors = sort_by_site({path: at for part in parts for path, at in part.tensors(found).items()}, host.view)
    check_adapter(adapter, host.view)
    return adapter


def _weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if (folder / WEIGHTS).is_file():
        return read_safetensors(folder / WEIGHTS)
    return read_pickle(folder / _PICKLED), {}


def _tell_beside(folder: Path) -> None:
    """Refuse what changes where adapters sit; say of what lies beside them that it is not theirs."""
    if (folder / _INTERFACE).is_file():
        raise FormatError(
            f"'{folder}' has an {_INTERFACE}: a plug-in interface of its own says where its adapters sit",
            next_step="train it on a class that the library knows by itself",
            code="unsupported_field",
        )
    if any((folder / name).is_file() for name in _HEADS):
        warn(
            f"'{folder}' holds a prediction head beside the adapter, which is not read: the model's own is used",
            next_step="give a model that has that head",
        )


# ── Writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def _save(adapter: Adapter, folder: Path, model: nn.Module | None, target: Path) -> None:
    if adapter.replaced:
        raise FormatError(
            f"adapter '{adapter.name}' replaces '{next(iter(adapter.replaced))}' whole, for which AdapterHub's files "
            "have no place",
            next_step="use format='native'",
            code="unsupported_field",
        )
    if model is None:
        raise BaseNeeded(
            f"AdapterHub's files tell blocks by number, which the model of adapter '{adapter.name}' says",
            next_step="save_adapter(adapter, path, format='adapterhub', model=model)",
        )
    check_adapter(adapter, ModelView.of(model))
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    host = ModelLayout.of(model, layouts.family_of(model_type, f"adapter '{adapter.name}'"))
    parts = _written(adapter, host)
    prefix = layouts.prefix_of(model)
    tensors = {k: t for part in parts for k, t in keys.keyed(adapter.name, prefix, part.places, part.tensors).items()}
    folder.mkdir()
    base = model.get_submodule(prefix.rstrip("."))
    described = {
        "config": config.config_of(parts),
        "hidden_size": model.config.hidden_size,  # type: ignore[union-attr]  # transformers', for it has a model_type
        "model_class": type(base).__name__.removesuffix("Model") + "AdapterModel"
        if any(part.own_class for part in parts)
        else type(model).__name__,
        "model_name": str(getattr(model.config, "name_or_path", "")),
        "model_type": model_type,
        "name": adapter.name,
        "version": config.VERSION,
    }
    metadata = {"format": "pt", _BASE: compute_base_hash(ModelView.of(model), adapter.tensors)}
    metadata[SEAL] = hash_contents(encode_config(described), tensors)
    write_safetensors(folder / WEIGHTS, tensors, metadata)
    write_json(folder / CONFIG, described)


def _written(adapter: Adapter, host: ModelLayout) -> list[ComponentFile]:
    """The configurations of an adapter's methods, in their order, each with its tensors."""
    parts: list[ComponentFile] = []
    layers = dataclasses.replace(adapter, tensors={})
    for part in adapter.variant.methods:
        own = {path: at for path, at in adapter.tensors.items() if adapter.variant.method_at(path) is part}
        if isinstance(part, Bottleneck):
            parts.append(bottlenecks.written(dataclasses.replace(adapter, variant=part, tensors=own), part, host))
            continue
        layers.tensors |= own
    if not layers.tensors:
        return parts
    first = not isinstance(adapter.variant.methods[0], Bottleneck)
    return [saving.written(layers, host), *parts] if first else [*parts, saving.written(layers, host)]


FORMAT = Format(
    name="adapterhub",
    looks_for=f"a folder with {CONFIG} and {WEIGHTS} or {_PICKLED}",
    recognises=_recognises,
    load=_load,
    save=_save,
)
