"""Writing a PEFT folder that PEFT loads and computes the same with."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorac.adapters.base_hash import compute_base_hash
from lorac.adapters.fit import check_adapter
from lorac.errors import FormatError
from lorac.formats._files import SEAL, encode_config, write_json
from lorac.formats._site_layouts import adapter_sites
from lorac.formats.peft import target_parameters as matrices
from lorac.formats.peft.checks import contains_tensors, saved_parameter_names, select_targets
from lorac.formats.peft.config import peft_types, write_config
from lorac.formats.peft.keys import (
    EMBEDDING_NAMES,
    PREFIX,
    SHARED_PREFIX,
    WRAPPED,
    copied_module,
    embedding_modules,
    is_saved,
)
from lorac.formats.peft.peft_type import ExpertFolders, PeftType
from lorac.frontend.model_view import ModelView
from lorac.ir.patterns import TARGET_KEYWORDS, is_named
from lorac.ir.sites import Site
from lorac.storage.tensor_file import hash_contents, write_safetensors
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant

Tensor = torch.Tensor
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE = "lorac_base"
"""Metadata entry of the weights that holds the base hash."""


def write_folder(adapter: Adapter, folder: Path, model: nn.Module | None, target: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors into a new folder, which is to be at ``target``.

    Raises:
        FormatError: PEFT has no type for the method, or no place for a tensor.
        BaseNeeded: The adapter comes from no file and no model was given.
    """
    if model is not None:
        check_adapter(adapter, ModelView.of(model))
    adapter = _converted(adapter)
    method = _method(adapter)
    if method.write_whole is not None:
        _save_whole(adapter, method.write_whole(adapter, model), folder, model, target)
        return
    sites = adapter_sites(adapter, model)
    own = matrices.matrix_paths(sites) if "target_parameters" in method.fields else set()
    _refuse_parts(adapter, {path: site for path, site in sites.items() if path not in own})
    tied = _tied(adapter, method) | _spread(adapter, method, model)
    tensors: dict[str, Tensor] = {}
    for path, at in adapter.tensors.items():
        if path in own:
            method.check_site(sites[path], at)
            continue
        written = method.write_site(adapter.variant, sites[path], at)
        for suffix, tensor in written.items():
            common = suffix in method.shared
            tensors[f"{SHARED_PREFIX}{suffix}" if common else f"{PREFIX}{_path(sites[path])}.{suffix}"] = tensor
    tensors |= {PREFIX + key: tensor for key, tensor in matrices.write_matrices(adapter, own, sites, model).items()}
    if method.shared_shapes is not None and model is not None:
        for name, shape in method.shared_shapes(adapter.variant, list(sites.values())).items():
            tensors[SHARED_PREFIX + name] = _resized(tensors[SHARED_PREFIX + name], shape)
    _refuse_torn(adapter, model)
    for name, tensor in _replaced(adapter, model).items():
        tensors[PREFIX + _key(adapter, name, method, tied, model, sites)] = tensor
    given = _targets(adapter, model, sites, own, tied)
    given["fan_in_fan_out"] = any(site.transposed for site in sites.values())
    if tied:
        given["ensure_weight_tying"] = True
    _write(adapter, given, tensors, folder, model)


def _save_whole(adapter: Adapter, whole: ExpertFolders, folder: Path, model: nn.Module | None, target: Path) -> None:
    """Write a file that holds no tensors of sites, and the adapters in folders of their own, where PEFT looks."""
    given = {whole.paths: {name: str(target / name) for name in whole.experts}}
    _write(adapter, given, whole.tensors, folder, model)
    for name, expert in whole.experts.items():
        write_folder(expert, folder / name, model, target / name)


def _write(
    adapter: Adapter, given: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path, model: nn.Module | None
) -> None:
    """The two files."""
    kept = adapter.provenance.get("config", {})
    config = write_config(adapter.variant, _method(adapter), given, kept if isinstance(kept, dict) else {})
    recorded = compute_base_hash(ModelView.of(model), adapter.tensors) if model else adapter.provenance.get("base")
    folder.mkdir()
    metadata = {"format": "pt"} | ({BASE: recorded} if recorded else {})
    metadata[SEAL] = hash_contents(seal_text(config, metadata), tensors)
    write_safetensors(folder / WEIGHTS, tensors, metadata)
    write_json(folder / CONFIG, config)


def _refuse_parts(adapter: Adapter, sites: Mapping[str, Site]) -> None:
    """PEFT adapts a module that reads several weights itself (an attention) whole, never its layers alone."""
    owners = [site.within for site in sites.values() if site.within is not None]
    for owner in owners:
        if owner not in sites or owners.count(owner) == 1:
            raise FormatError(
                f"PEFT adapts all of '{owner}' or nothing, and adapter '{adapter.name}' adapts a part of it",
                next_step=f"target '{owner}' itself, which names all of it, or use format='native'",
                code="unsupported_field",
            )


def _refuse_torn(adapter: Adapter, model: nn.Module | None) -> None:
    """PEFT reads a whole embedding into the model's own tensor: those that are tied there cannot become two."""
    known = {} if model is None else ModelView.of(model).named_tensors()
    seen: dict[int, str] = {}
    for name in (name for name in adapter.replaced if not is_saved(name, adapter.variant.modules_to_save)):
        other = seen.setdefault(id(known.get(name, name)), name)
        if not torch.equal(adapter.replaced[name], adapter.replaced[other]):
            raise FormatError(
                f"adapter '{adapter.name}' replaces '{other}' and '{name}', which are one tensor in the model, by two",
                next_step="name their modules in modules_to_save, or use format='native'",
                code="unsupported_field",
            )


def _path(site: Site) -> str:
    """What stands before the suffix in the keys of a site."""
    if site.within in {None, site.path}:
        return site.path
    return f"{site.within}.{WRAPPED}{site.path.removeprefix(str(site.within))}"


def seal_text(config: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    """What is sealed with the tensors: the configuration, its own names sorted as in its file, and the base hash."""
    return encode_config({"config": {name: config[name] for name in sorted(config)}, BASE: metadata.get(BASE)})


def _resized(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The corner of a tensor, among zeros where it is smaller than ``shape``."""
    corner = tuple(slice(min(pair)) for pair in zip(tensor.shape, shape, strict=True))
    made = tensor.new_zeros(shape)
    made[corner] = tensor[corner]
    return made


def _converted(adapter: Adapter) -> Adapter:
    """The adapter as one of a method that PEFT has, where a type says how."""
    kind = type(adapter.variant)
    convert = next((method.converted[kind] for method in peft_types().values() if kind in method.converted), None)
    return adapter if convert is None else convert(adapter)


def _method(adapter: Adapter) -> PeftType:
    for method in peft_types().values():
        if type(adapter.variant) in method.variants.keys() - method.only_read:
            return method
    raise FormatError(
        f"PEFT has no type for '{adapter.variant.name}', the method of adapter '{adapter.name}'",
        next_step="use format='native', or lorac.to_lora(adapter, model), which makes a LoRA of what it does",
        code="unsupported_field",
    )


def _tied(adapter: Adapter, method: PeftType) -> dict[str, str]:
    """Ties that the adapter was read with and that its tensors still keep."""
    kept = {}
    for name, source in adapter.provenance.get("tied", {}).items():
        if name in adapter.replaced and source in adapter.replaced:
            same = torch.equal(adapter.replaced[name], adapter.replaced[source])
        else:
            crossed = method.tied_to(adapter.tensors.get(source, {}))
            same = bool(crossed) and contains_tensors(adapter.tensors.get(name, {}), crossed)
        if same:
            kept[name] = source
    return kept


def _spread(adapter: Adapter, method: PeftType, model: nn.Module | None) -> dict[str, str]:
    """Sites that get their tensors in PEFT with those of another, which they are tied to in the model."""
    if method.spread is None or model is None:
        return {}
    found = method.spread(adapter.tensors, ModelView.of(model).sites)
    for path, source in found.items():
        if not contains_tensors(adapter.tensors.get(path, {}), method.tied_to(adapter.tensors[source])):
            raise FormatError(
                f"PEFT changes '{path}' with '{source}', which it is tied to, and adapter '{adapter.name}' does not",
                next_step="adapt both alike, or use format='native'",
                code="unsupported_field",
            )
    return found


def _replaced(adapter: Adapter, model: nn.Module | None) -> dict[str, Tensor]:
    """The replacements; of saved modules also what was not trained, for PEFT reads them whole."""
    replaced = dict(adapter.replaced)
    if model is not None:
        known = ModelView.of(model).named_tensors()
        for name in saved_parameter_names(adapter.variant, model):
            replaced.setdefault(name, known[name])
    return replaced


def _key(
    adapter: Adapter,
    name: str,
    method: PeftType,
    tied: Mapping[str, str],
    model: nn.Module | None,
    sites: Mapping[str, Site],
) -> str:
    """The key of a replacement, without the prefix."""
    module, _, parameter = name.rpartition(".")
    whole = copied_module(adapter.variant, name)
    if whole and method.copied:
        return f"{whole}.{method.copied}{name.removeprefix(whole)}"
    if is_saved(name, adapter.variant.modules_to_save) or name in tied:
        return name
    bias = adapter.variant.bias if "bias" in method.fields else "none"
    if parameter == "bias" and bias != "none" and (bias == "all" or module in adapter.tensors):
        return f"{_path(sites[module])}.{WRAPPED}.bias" if module in adapter.tensors else name
    if module not in adapter.tensors and module in set(_embeddings(module, model)):
        return name
    raise FormatError(
        f"PEFT has no place for '{name}', which adapter '{adapter.name}' replaces",
        next_step="name its module in modules_to_save, or use format='native'",
        code="unsupported_field",
    )


def _embeddings(module: str, model: nn.Module | None) -> Iterator[str]:
    if module.rpartition(".")[2] in EMBEDDING_NAMES:
        yield module
    if model is not None:
        yield from embedding_modules(model)


def _targets(
    adapter: Adapter,
    model: nn.Module | None,
    known: Mapping[str, Site],
    own: set[str],
    tied: Mapping[str, str],
) -> dict[str, Any]:
    """The fields that make PEFT target exactly the adapter's sites; as the variant has them if they do."""
    sites = known if model is None else ModelView.of(model).sites
    parameters = matrices.target_parameters(adapter.variant.parameters, own, sites)
    variant = dataclasses.replace(adapter.variant, parameters=parameters)
    wanted = {path for path in adapter.tensors if path not in tied}
    # Layers within such a module come with it; named by themselves, PEFT would wrap them once more.
    inner = {path for path in wanted - own if sites[path].within not in {None, path}}

    def exact(variant: Variant) -> bool:
        return set(select_targets(variant, sites, model)) == wanted

    # What PEFT makes of "all-linear" depends on its class of model, and with layers it wants a list.
    narrowed = {"exclude_modules": variant.exclude, "layers_to_transform": variant.layers}
    said = all(name in _method(adapter).fields for name, value in narrowed.items() if value)
    spelt = (
        variant.targets not in TARGET_KEYWORDS
        and not any(is_named(variant.targets, path) for path in inner)
        and not (isinstance(variant.targets, str) and variant.layers)
    )
    if spelt and said and exact(variant):
        return {"target_parameters": list(parameters) or None} | ({} if variant.layers else {"layers_pattern": None})
    named = wanted - inner - own
    suffixes = tuple(sorted({path.rpartition(".")[2] for path in named}))
    paths = tuple(sorted(named))
    bare = dataclasses.replace(variant, exclude=(), layers=(), layers_pattern=())
    short = model is not None and exact(dataclasses.replace(bare, targets=suffixes))
    long = exact(dataclasses.replace(bare, targets=paths))
    pattern = "|".join(re.escape(path) for path in paths)
    return {
        "target_parameters": list(parameters) or None,
        "target_modules": list(suffixes) if short else list(paths) if long else pattern,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
