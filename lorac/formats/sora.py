"""SoRA's own folders: a state dict with ``<layer>.lora.gate`` and config.json.

Source: TsinghuaC3I/SoRA, built on OpenDelta, whose configuration names the other trained modules.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from lorac.argument_types import JsonMapping
from lorac.formats._authors import AuthorsFormat, KeyRow, Tensors, required
from lorac.formats._config_fields import Applied, Field, Irrelevant, TrainingOnly, read_names, read_number, read_size
from lorac.variants.adaptive_rank import SoRA
from lorac.variants.base import Variant

_DELTAS = "deltas"
"""OpenDelta's word for the parameters that it adds to a model."""


_OF_OPENDELTA = (
    "backbone_checkpoint_name backbone_class backbone_hash common_structure delta_type exclude_modules "
    "modified_modules opendelta_version transformers_version"
)
_SETTINGS: Mapping[str, Field] = {
    "lora_r": required("r", read_size),
    "lora_alpha": required("alpha", read_number),
    "lora_dropout": TrainingOnly(0.0, to="dropout", read=read_number),
    "unfrozen_modules": Applied(
        (_DELTAS,), read=lambda value: value if isinstance(value, tuple) else read_names(value)
    ),
    **dict.fromkeys(_OF_OPENDELTA.split(), Irrelevant()),
}


class SoraFormat(AuthorsFormat):
    """SoRA's own folders."""

    name = "sora"
    looks_for = "a folder with tensors <layer>.lora.gate, and config.json"
    written_by = "SoRA's authors, with OpenDelta"
    methods = (SoRA,)
    rows = (
        KeyRow("*.lora.lora_A", "*", "lora_A"),
        KeyRow("*.lora.lora_B", "*", "lora_B"),
        KeyRow("*.lora.gate", "*", "gate", is_row=True),
    )
    mark = re.compile(r"\.lora\.gate$")
    weights = "pytorch_model.bin"
    settings_file = "config.json"
    settings = _SETTINGS

    def make_variant(self, values: JsonMapping, tensors: Mapping[str, Tensors], file: Path) -> SoRA:
        others = tuple(name for name in values["unfrozen_modules"] if name != _DELTAS)
        dropout = float(values["lora_dropout"])
        return SoRA(r=values["lora_r"], alpha=values["lora_alpha"], dropout=dropout, modules_to_save=others)

    def is_trained(self, key: str, values: JsonMapping) -> bool:
        module = key.rpartition(".")[0].lower().replace("layernorm", "layer_norm")
        return any(name.lower() in module for name in values["unfrozen_modules"] if name != _DELTAS)

    def describe(self, variant: Variant) -> JsonMapping:
        return {**super().describe(variant), "unfrozen_modules": [_DELTAS, *variant.modules_to_save]}
