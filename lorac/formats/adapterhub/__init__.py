"""AdapterHub's folders: adapter_config.json with adapter.safetensors or pytorch_adapter.bin.

A key contains the number of a block. The model's module with that number is found from the structure of the model
(``lorac.frontend.residual_stream``), so a file cannot be read without the model.
"""

import dataclasses
from pathlib import Path

from lorac.adapters.base_hash import compute_base_hash
from lorac.adapters.fit import check_adapter, sort_by_site
from lorac.errors import require_base, warn
from lorac.formats._config_fields import BASE_HASH, encode_config, write_json, write_sealed
from lorac.formats._errors import unsupported_error
from lorac.formats._format import Evidence, Format
from lorac.formats.adapterhub.bottlenecks import write_bottlenecks
from lorac.formats.adapterhub.components import ComponentFile, ModelLayout
from lorac.formats.adapterhub.config import VERSION, join_configs, read_config
from lorac.formats.adapterhub.keys import assign_tensors, modernise_key, name_tensors
from lorac.formats.adapterhub.layouts import INVERTIBLE, base_prefix, family_of
from lorac.formats.adapterhub.lora_writer import write_loras
from lorac.formats.peft.writer import WEIGHTS as PEFT_WEIGHTS
from lorac.formats.reading import AdapterFile
from lorac.frontend.model_view import ModelView
from lorac.variants.adapter import Adapter
from lorac.variants.bottleneck import Bottleneck
from lorac.variants.dora import DoRA
from lorac.variants.entrywise import IA3
from lorac.variants.lora import LoRA
from lorac.variants.split import Split
from lorac.variants.union import Union

CONFIG = "adapter_config.json"
WEIGHTS, PICKLED = "adapter.safetensors", "pytorch_adapter.bin"
_HEADS = ("model_head.safetensors", "pytorch_model_head.bin")
_INTERFACE = "adapter_interface.json"
_COMPOSITIONS = {
    "adapter_fusion_config.json": "a fusion that attends over several adapters",
    "adapter_setup.json": "how adapters are stacked, fused or run in parallel",
}
"""Files of folders without an adapter -> their contents."""


class AdapterHubFormat(Format):
    """AdapterHub's folders."""

    name = "adapterhub"
    looks_for = f"a folder with {CONFIG} and {WEIGHTS} or {PICKLED}"
    written_by = "AdapterHub's `adapters`"
    evidence = Evidence.LAYOUT
    refines = "peft"
    methods = (Bottleneck, DoRA, IA3, LoRA, Split, Union)

    def recognises(self, file: AdapterFile) -> bool:
        folder = file.folder_with(CONFIG, WEIGHTS, PICKLED)
        if _find_composition(folder) is not None:
            return True
        has_weights = folder.has(WEIGHTS) or folder.has(PICKLED)
        return has_weights and folder.has(CONFIG) and not folder.has(PEFT_WEIGHTS)

    def read(self, file: AdapterFile, view: ModelView | None, name: str | None) -> Adapter:
        opened = file.folder_with(CONFIG, WEIGHTS, PICKLED)
        name, folder = name or opened.adapter_name, opened.path
        composition = _find_composition(opened)
        if composition is not None:
            raise unsupported_error(
                f"'{folder / composition}' is AdapterHub's and says {_COMPOSITIONS[composition]}; lorac reads adapters "
                "one by one",
                next_step="load each adapter's own folder; lorac.Chain puts methods of the weight form after one "
                "another, and a weighted swap adds the changes of several",
            )
        raw = opened.inside(CONFIG).read_json()
        weights = opened.choose(WEIGHTS, PICKLED)
        stored = weights.read_tensors()
        weights.check_seal(encode_config(raw), stored)
        tensors = {modernise_key(key): tensor for key, tensor in stored.items()}
        header, configs = read_config(raw, folder / CONFIG, invertible=any(INVERTIBLE in key for key in tensors))
        family = family_of(header.model_type, f"'{folder / CONFIG}'")
        view = require_base(
            view,
            f"AdapterHub's files name blocks by number, and the modules of adapter '{name}' depend on the model",
            next_step="load_adapter(path, model)",
        )
        if opened.has(_INTERFACE):
            raise unsupported_error(
                f"'{folder}' has an {_INTERFACE}: a plug-in interface of its own says where its adapters sit",
                next_step="train it on a class that the library knows by itself",
            )
        if any(map(opened.has, _HEADS)):
            warn(
                f"'{folder}' holds a prediction head as well, which is not read: the model's own is used",
                next_step="give a model that has that head",
            )
        layout = ModelLayout.of(view, family)
        components = [config(layout, name) for config in configs]
        variants = [variant for component in components for variant in component.variants]
        variant = variants[0] if len(variants) == 1 else Union.over(*variants)
        base = weights.metadata.get(BASE_HASH)
        provenance = {"format": self.name, "source": str(folder), "config": raw, "base": base}
        adapter = Adapter(name, variant, provenance=provenance)
        patterns = [pattern for component in components for pattern in component.patterns]
        assigned = assign_tensors(name, header.name, patterns, tensors)
        read = {path: tensors for component in components for path, tensors in component.read(assigned).items()}
        adapter.tensors = sort_by_site(read, view)
        check_adapter(adapter, view)
        return adapter

    def write(self, adapter: Adapter, path: Path, view: ModelView | None, target: Path) -> None:
        if adapter.replaced:
            raise unsupported_error(
                f"adapter '{adapter.name}' replaces '{next(iter(adapter.replaced))}' whole, and AdapterHub's files "
                "cannot store that"
            )
        view = require_base(
            view,
            f"AdapterHub's files name blocks by number, and those of adapter '{adapter.name}' depend on the model",
            next_step="save_adapter(adapter, path, format='adapterhub', model=model)",
        )
        model = view.module
        config = getattr(model, "config", None)
        model_type = getattr(config, "model_type", None)
        layout = ModelLayout.of(view, family_of(model_type, f"adapter '{adapter.name}'"))
        check_adapter(adapter, view)
        components = _write_components(adapter, layout)
        own_class = any(component.own_class for component in components)
        prefix = base_prefix(model, own_class=own_class)
        tensors = {
            key: tensor
            for component in components
            for key, tensor in name_tensors(adapter.name, prefix, component.patterns, component.tensors).items()
        }
        described = {
            "config": join_configs(components),
            "hidden_size": getattr(config, "hidden_size", None),
            "model_class": f"{type(model).__name__.partition('For')[0].removesuffix('Model')}AdapterModel"
            if own_class
            else type(model).__name__,
            "model_name": str(getattr(config, "name_or_path", "")),
            "model_type": model_type,
            "name": adapter.name,
            "version": VERSION,
        }
        recorded = compute_base_hash(view, adapter.tensors)
        metadata = {"format": "pt"} | ({BASE_HASH: recorded} if recorded else {})
        path.mkdir()
        write_sealed(path / WEIGHTS, tensors, metadata, encode_config(described))
        write_json(path / CONFIG, described)


def _find_composition(folder: AdapterFile) -> str | None:
    """Return the file that marks a folder as a composition of several adapters; None if the folder has none."""
    return None if folder.has(CONFIG) else next(filter(folder.has, _COMPOSITIONS), None)


def _write_components(adapter: Adapter, layout: ModelLayout) -> list[ComponentFile]:
    """Convert the methods of an adapter to components of a file, in the order of the methods."""
    written: list[ComponentFile] = []
    layers = dataclasses.replace(adapter, tensors={})
    for method in adapter.variant.methods:
        tensors = {path: t for path, t in adapter.tensors.items() if adapter.variant.method_at(path) is method}
        if isinstance(method, Bottleneck):
            part = dataclasses.replace(adapter, variant=method, tensors=tensors)
            written.append(write_bottlenecks(part, method, layout))
        else:
            layers.tensors |= tensors
    if not layers.tensors:
        return written
    loras = write_loras(layers, layout)
    return [*written, loras] if isinstance(adapter.variant.methods[0], Bottleneck) else [loras, *written]
