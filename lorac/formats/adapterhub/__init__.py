"""AdapterHub's folders: adapter_config.json with adapter.safetensors or pytorch_adapter.bin, of bottleneck adapters.

A key tells the number of a block and the kind of a sublayer, and which modules of a model these are is found by
structure (`lorac.ir.host.sublayers`): a file means nothing without its model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorac.adapters.base_hash import base_hash
from lorac.adapters.fit import check_adapter, in_order
from lorac.errors import BaseNeeded, CorruptFile, UnsupportedField, UnusedTensors, nearest_name, warn
from lorac.formats._files import (
    HUB_WEIGHTS,
    SEAL,
    check_seal,
    config_text,
    read_json,
    read_pickle,
    read_safetensors,
    write_json,
)
from lorac.formats._format import Format
from lorac.formats.adapterhub import config, layouts
from lorac.formats.peft.save import WEIGHTS as PEFT_WEIGHTS
from lorac.ir.host.sites import find_sites
from lorac.ir.host.sublayers import Stream, Sublayer, stream_of, sublayer_sites
from lorac.ir.store.tensors import seal, write_safetensors
from lorac.variants.adapter import Adapter
from lorac.variants.bottleneck import Bottleneck

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
        raise UnsupportedField(
            f"'{folder / composed}' is AdapterHub's and says {_COMPOSED[composed]}; lorac reads bottlenecks one by one",
            next_step="load each adapter's own folder; lorac.Chain puts methods of the weight form after one another, "
            "and a weighted swap adds what several do",
        )
    file = folder / CONFIG
    raw = read_json(file)
    tensors, metadata = _weights(folder)
    check_seal(folder, config_text(raw), tensors, metadata)
    keys = {_modern(key): tensor for key, tensor in tensors.items()}
    read = config.read_config(raw, file, invertible=any(layouts.INVERTIBLE in key for key in keys))
    stacks = layouts.family_of(read.model_type, f"'{file}'")
    name = name or folder.resolve().name
    if model is None:
        raise BaseNeeded(
            f"a file of AdapterHub's tells blocks by number: which modules adapter '{name}' is for, its model says",
            next_step="load_adapter(path, model)",
        )
    _tell_beside(folder)
    stream = stream_of(model)
    sublayers = sublayer_sites(model, stream)
    variant = config.with_reductions(read, stream, sublayers).placed(model, stream)
    if not read.undone:  # transformers' own classes run under the library without the inverse
        targets = tuple(path for path in variant.targets if path not in variant.heads)
        variant = dataclasses.replace(variant, heads=(), targets=targets)
    adapter = Adapter(name, variant, provenance={"format": FORMAT.name, "source": str(folder), "config": raw})
    adapter.provenance["base"] = metadata.get(_BASE)
    places = layouts.places_in(stacks, stream, sublayers)
    adapter.tensors = in_order(_placed(name, read.name, variant, places, keys), model)
    check_adapter(adapter, find_sites(model), model)
    return adapter


def _weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if (folder / WEIGHTS).is_file():
        return read_safetensors(folder / WEIGHTS)
    return read_pickle(folder / _PICKLED), {}


def _modern(key: str) -> str:
    for old, new in layouts.LEGACY.items():
        key = key.replace(old, new)
    return key


def _tell_beside(folder: Path) -> None:
    """Refuse what changes where adapters sit; say of what lies beside them that it is not theirs."""
    if (folder / _INTERFACE).is_file():
        raise UnsupportedField(
            f"'{folder}' has an {_INTERFACE}: a plug-in interface of its own says where its adapters sit",
            next_step="train it on a class that the library knows by itself",
        )
    if any((folder / name).is_file() for name in _HEADS):
        warn(
            f"'{folder}' holds a prediction head beside the adapter, which is not read: the model's own is used",
            next_step="give a model that has that head",
        )


def _placed(
    adapter: str, called: str, variant: Bottleneck, places: Mapping[str, str], keys: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Site path -> lorac's name -> tensor; every key is used, and every tensor there.

    Raises:
        UnusedTensors, CorruptFile: one is not.
    """
    here = {place: path for path, place in places.items() if path in variant.targets}
    own, common, coupled = layouts.leaves(variant), layouts.shared_leaves(variant), layouts.COUPLING
    found: dict[str, dict[str, Tensor]] = {path: {} for path in here.values()}
    ends = (*variant.embeddings, *variant.heads)
    shared: dict[str, Tensor] = {}
    coupling: dict[str, Tensor] = {}
    for key, tensor in keys.items():
        place, part, leaf = _split(key, called)
        if part == layouts.INVERTIBLE and leaf in coupled and ends:
            coupling[coupled[leaf]] = tensor
        elif part == layouts.SHARED and leaf in common:
            shared[common[leaf]] = tensor
        elif part == layouts.PLACED and _ending(place, here) is not None and leaf in own:
            _put(found[here[_ending(place, here) or ""]], own[leaf], tensor, key)
        else:
            raise UnusedTensors(
                f"the file of adapter '{adapter}' holds '{key}', for which its configuration or the model has no place",
                nearest=nearest_name(place, here),
                next_step="load the model that it was trained on",
            )
    for path in found:
        found[path] |= shared
    _complete(adapter, found, {*own.values(), *common.values()})
    found |= {path: dict(coupling) for path in ends}
    _complete(adapter, {path: found[path] for path in ends}, set(coupled.values()))
    return found


def _split(key: str, called: str) -> tuple[str, str, str]:
    """(what stands before, which part, the leaf) of a key; the adapter's name stands after the part."""
    for part in (layouts.INVERTIBLE, layouts.SHARED, layouts.PLACED):
        before, found, leaf = f".{key}".rpartition(f".{part}.{called}.")
        if found:
            return before.removeprefix("."), part, leaf
    return key, "", ""


def _ending(place: str, here: Mapping[str, str]) -> str | None:
    """The place that what stands before ends with."""
    parts = place.split(".")
    return next((end for i in range(len(parts)) if (end := ".".join(parts[i:])) in here), None)


def _put(at: dict[str, Tensor], name: str, tensor: Tensor, key: str) -> None:
    if name in at and not torch.equal(at[name], tensor):
        raise CorruptFile(f"'{key}' is one tensor under two names, and the two differ")
    at[name] = tensor


def _complete(adapter: str, found: Mapping[str, Mapping[str, Tensor]], wanted: Iterable[str]) -> None:
    lacking = [f"'{name}' at '{path}'" for path, at in found.items() for name in sorted(set(wanted) - at.keys())]
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise CorruptFile(
            f"the file of adapter '{adapter}' lacks {lacking[0]}{more}, which its configuration promises",
            next_step="save it from a class with a head: of a bare model the library leaves out what sites share"
            if "phm_rule" in lacking[0]
            else "it is incomplete, or was made for a smaller model",
        )


# ── Writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def _save(adapter: Adapter, folder: Path, model: nn.Module | None, target: Path) -> None:
    variant = adapter.variant
    if not isinstance(variant, Bottleneck) or adapter.replaced:
        what = f"replaces '{next(iter(adapter.replaced))}'" if adapter.replaced else f"is of method '{variant.name}'"
        raise UnsupportedField(
            f"adapter '{adapter.name}' {what}; AdapterHub's files, as lorac writes them, hold bottlenecks alone",
            next_step="use format='native'",
        )
    if model is None:
        raise BaseNeeded(
            f"AdapterHub's files tell blocks by number, which the model of adapter '{adapter.name}' says",
            next_step="save_adapter(adapter, path, format='adapterhub', model=model)",
        )
    check_adapter(adapter, find_sites(model), model)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    stacks = layouts.family_of(model_type, f"adapter '{adapter.name}'")
    stream = stream_of(model)
    sublayers = sublayer_sites(model, stream)
    chosen, reductions = _chosen(adapter, variant, model, stream, sublayers)
    places, prefix = layouts.places_in(stacks, stream, sublayers), layouts.prefix_of(model)
    tensors = _keyed(adapter, variant, places, prefix)
    folder.mkdir()
    base = model.get_submodule(prefix.rstrip("."))
    described = {
        "config": config.written(variant, reductions, chosen),
        "hidden_size": model.config.hidden_size,  # type: ignore[union-attr]  # transformers', for it has a model_type
        "model_class": type(base).__name__.removesuffix("Model") + "AdapterModel"
        if variant.heads
        else type(model).__name__,
        "model_name": str(getattr(model.config, "name_or_path", "")),
        "model_type": model_type,
        "name": adapter.name,
        "version": config.VERSION,
    }
    metadata = {"format": "pt", _BASE: base_hash(model, adapter.tensors)}
    metadata[SEAL] = seal(config_text(described), tensors)
    write_safetensors(folder / WEIGHTS, tensors, metadata)
    write_json(folder / CONFIG, described)


def _chosen(
    adapter: Adapter, variant: Bottleneck, model: nn.Module, stream: Stream, sublayers: Mapping[str, Sublayer]
) -> tuple[dict[str, Any], dict[str, float]]:
    """The fields that make the library place bottlenecks where the adapter's are, and blocks' own reduction factors.

    Raises:
        UnsupportedField: none do, or the adapter computes with other residuals than the model's.
    """
    ends = {*variant.embeddings, *variant.heads}
    paths = adapter.tensors.keys() - ends
    kinds = {sublayers[path].kind for path in paths & sublayers.keys()}
    numbers = {block: number for number, block in enumerate(stream.blocks)}
    filled = {sublayers[path].block for path in paths & sublayers.keys()}
    able = {found.block for found in sublayers.values() if found.kind in kinds}
    fields: dict[str, Any] = {
        "mh_adapter": "attention" in kinds,
        "output_adapter": "mlp" in kinds,
        "cross_adapter": "cross" in kinds,
        "leave_out": tuple(sorted(numbers[block] for block in able - filled)),
    }
    asked = dataclasses.replace(
        variant, targets=(), exclude=(), layers=(), residuals={}, inner={}, embeddings=(), heads=(), **fields
    ).placed(model, stream)
    same = all(getattr(asked, name) == getattr(variant, name) for name in ("residuals", "inner", "norm_eps"))
    places = {*asked.targets} - {*asked.embeddings, *asked.heads}
    if places != paths or not same or asked.embeddings != variant.embeddings:
        raise UnsupportedField(
            f"AdapterHub puts bottlenecks at all attentions, all MLPs or both of a block, and adapter '{adapter.name}' "
            "sits, or reads, elsewhere",
            next_step="use format='native'",
        )
    return fields, _reductions(adapter, variant, {path: numbers[sublayers[path].block] for path in paths})


def _reductions(adapter: Adapter, variant: Bottleneck, numbers: Mapping[str, int]) -> dict[str, float]:
    found: dict[str, float] = {}
    for path, number in numbers.items():
        own = variant.at_path(path).reduction_factor  # type: ignore[attr-defined]  # a bottleneck's
        if found.setdefault(str(number), own) != own:
            raise UnsupportedField(
                f"AdapterHub has one reduction_factor a block, and adapter '{adapter.name}' has two in block {number}",
                next_step="use format='native'",
            )
    return {number: own for number, own in found.items() if own != variant.reduction_factor}


def _keyed(adapter: Adapter, variant: Bottleneck, places: Mapping[str, str], prefix: str) -> dict[str, Tensor]:
    """Key -> tensor."""
    tensors: dict[str, Tensor] = {}
    for path, at in adapter.tensors.items():
        if path in variant.embeddings:
            stem, names = f"{prefix}{layouts.INVERTIBLE}.{adapter.name}", layouts.COUPLING
        elif path in variant.heads:
            continue
        else:
            stem, names = f"{prefix}{places[path]}.{layouts.PLACED}.{adapter.name}", layouts.leaves(variant)
            common = layouts.shared_leaves(variant)
            shared = f"{prefix}{layouts.SHARED}.{adapter.name}"
            tensors |= {f"{shared}.{leaf}": at[name] for leaf, name in common.items()}
        tensors |= {f"{stem}.{leaf}": at[name] for leaf, name in names.items()}
    return tensors


FORMAT = Format(
    name="adapterhub",
    looks_for=f"a folder with {CONFIG} and {WEIGHTS} or {_PICKLED}",
    recognises=_recognises,
    load=_load,
    save=_save,
)
