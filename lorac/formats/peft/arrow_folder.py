"""Arrow in files: PEFT saves the router in a folder beside the folders of the LoRAs that it chooses from.

Source: peft.tuners.lora.arrow of PEFT 0.21. The router's own lora_A and lora_B are not used. PEFT approximates the
direction of an expert by 15 rounds of power iteration from a random vector; lorac computes it exactly. With use_gks the
mean of the general LoRAs' factors is subtracted from each expert's factors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from lorac.errors import shape_error
from lorac.formats._config_fields import (
    Applied,
    Field,
    Irrelevant,
    read_fields,
    read_flag,
    read_names,
    read_number,
    read_size,
)
from lorac.formats._errors import corrupt_error
from lorac.formats.peft.reader import read_folder
from lorac.formats.reading import AdapterFile
from lorac.frontend.model_view import ModelView
from lorac.storage.paths import find_inner_path
from lorac.variants.adapter import Adapter
from lorac.variants.arrow import Arrow

FIELDS: Mapping[str, Field] = {
    "top_k": Applied(3, to="top_k", read=read_size),
    "router_temperature": Applied(1.0, to="temperature", read=read_number),
    "use_gks": Applied(False, read=read_flag),
    "task_adapter_names": Applied(read=read_names),
    "gks_adapter_names": Applied(read=read_names),
    "rng_seed": Irrelevant(),
}
"""Fields of PEFT's ArrowConfig."""


def read_router(folder: AdapterFile, config: Mapping[str, object], name: str, view: ModelView | None) -> Adapter:
    """Read the adapter from a router's folder and the LoRAs beside it.

    Raises:
        FormatError: the folder of a LoRA is missing.
        AdapterError: the LoRAs cannot be combined.
    """
    values = read_fields(config, FIELDS, folder.path)
    experts = _read_loras(folder, values["task_adapter_names"], name, view)
    general = _read_loras(folder, values["gks_adapter_names"], name, view) if values["use_gks"] else []
    if general:
        experts = [_subtract_mean(expert, general) for expert in experts]
    fields = {field.to: values[key] for key, field in FIELDS.items() if field.to}
    return Arrow.from_loras(experts, name=name, sites=[] if view is None else list(view.sites), **fields)


def _read_loras(folder: AdapterFile, names: Sequence[str], router: str, view: ModelView | None) -> list[Adapter]:
    parent = folder.path.parent
    for name in names:
        if find_inner_path(parent, name) is None or not (parent / name).is_dir():
            raise corrupt_error(
                f"the router '{router}' chooses from the LoRA '{name}', and '{parent}' has no such folder",
                next_step="keep the folder of the router next to those that PEFT saved with it",
            )
    return [read_folder(AdapterFile(parent / name), view, None) for name in names]


def _subtract_mean(expert: Adapter, general: Sequence[Adapter]) -> Adapter:
    """Subtract the mean of the general LoRAs' factors from an expert's factors (GenKnowSub)."""
    tensors = {}
    for path, factors in expert.tensors.items():
        others, shapes = [one.tensors.get(path, {}) for one in general], {key: t.shape for key, t in factors.items()}
        if any({key: t.shape for key, t in other.items()} != shapes for other in others):
            raise shape_error(
                f"the general LoRAs at '{path}' are of other shapes than '{expert.name}'",
                next_step="use LoRAs of one rank on the same layers",
            )
        tensors[path] = {key: t - torch.stack([other[key] for other in others]).mean(0) for key, t in factors.items()}
    return replace(expert, tensors=tensors)
