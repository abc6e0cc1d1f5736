"""PEFT type XLORA: several LoRAs, mixed by a classifier.

Source: peft.tuners.xlora of PEFT 0.21 (config.py, classifier.py, layer.py). The file holds the classifier alone, as
``base_model.internal_xlora_classifier.layers.<j>.weight`` and ``bias``, j its place among ReLUs and dropouts too; the
experts lie in folders of their own, as ``adapters`` says. PEFT reads all of a classifier, whatever it saves of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorac.errors import FormatError
from lorac.formats._xlora import XLoraFolder, read_expert_paths, split_xlora
from lorac.formats.peft import config
from lorac.formats.peft.fields import mismatched_shapes
from lorac.formats.peft.peft_type import ExpertFolders, Field, FieldUse, PeftType, Tensors
from lorac.ir.sites import Site
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant
from lorac.variants.x_lora import XLoRA

_OF_SITES = frozenset({"fan_in_fan_out", "modules_to_save", "target_modules"})
_CLASSIFIER = "base_model.internal_xlora_classifier.layers."


def top_k(value: Any) -> int | None:
    """How many experts a token keeps, or null for all."""
    return None if value is None else config.rank(value)


def width(value: Any) -> int:
    """How wide the hidden state is; PEFT takes null for 4096."""
    return 4096 if value is None else config.rank(value)


FIELDS = {
    **{name: field for name, field in config.COMMON.items() if name not in _OF_SITES},
    "hidden_size": Field(FieldUse.APPLIED, to="hidden_size", read=width),
    "adapters": Field(FieldUse.APPLIED, read=read_expert_paths),
    "enable_softmax": Field(FieldUse.APPLIED, True, to="enable_softmax", read=config.flag),
    "enable_softmax_topk": Field(FieldUse.APPLIED, False, to="enable_softmax_topk", read=config.flag),
    "layerwise_scalings": Field(FieldUse.APPLIED, False, to="layerwise_scalings", read=config.flag),
    "xlora_depth": Field(FieldUse.APPLIED, 1, to="depth", read=config.rank),
    "xlora_size": Field(FieldUse.APPLIED, 2048, to="size", read=config.rank),
    "xlora_dropout_p": Field(FieldUse.TRAINING, 0.2, to="dropout_p", read=config.number),
    "use_trainable_adapters": Field(FieldUse.TRAINING, False, to="use_trainable_adapters", read=config.flag),
    "softmax_temperature": Field(FieldUse.APPLIED, 1.0, to="softmax_temperature", read=config.number),
    "top_k_lora": Field(FieldUse.APPLIED, to="top_k_lora", read=top_k),
    "scaling_pass_value": Field(FieldUse.APPLIED, 0.0, to="scaling_pass_value", read=config.number),
    "global_scaling_weight": Field(FieldUse.APPLIED, 1.0, to="global_scaling_weight", read=config.number),
}


def read_whole(
    folder: Path, values: Mapping[str, Any], tensors: Tensors, name: str, model: nn.Module | None
) -> Adapter:
    """The adapter of a folder (``lorac.formats._xlora``)."""
    stride = 3 if values["xlora_dropout_p"] > 0 else 2
    keys = [f"{_CLASSIFIER}{stride * j}.weight" for j in range(values["xlora_depth"])]
    fields = {field.to: values[key] for key, field in FIELDS.items() if field.to}
    found = XLoraFolder(folder, values["adapters"], fields, tensors, keys)
    return found.adapter(name, model, ("{path}", "{name}"))


def read_site(variant: Variant, path: str, stored: Tensors) -> tuple[Site, dict[str, torch.Tensor]]:
    """Refuse: a file has no tensors of sites."""
    raise mismatched_shapes(path, stored, "XLORA holds a classifier")


def write_site(variant: Variant, site: Site, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Refuse: a file has no tensors of sites."""
    raise mismatched_shapes(site.path, tensors, "XLORA holds a classifier")


def write_whole(adapter: Adapter, model: nn.Module | None) -> ExpertFolders:
    """The classifier, all of it, and the experts, called by their numbers as PEFT activates them.

    Raises:
        FormatError: PEFT's classifier has ReLUs between its layers.
        BaseNeeded: each layer has weights of its own, and only the model tells which number PEFT gives a layer.
    """
    variant = adapter.variant
    assert isinstance(variant, XLoRA)
    if variant.depth > 1 and not variant.activation:
        raise FormatError(
            f"the classifier of adapter '{adapter.name}' has nothing between its layers, and PEFT's has ReLUs",
            next_step="use format='native'",
            code="unsupported_field",
        )
    stride = 3 if variant.dropout_p > 0 else 2
    keys = [f"{_CLASSIFIER}{stride * j}.weight" for j in range(variant.depth)]
    return ExpertFolders(*split_xlora(adapter, model, keys), "adapters")


METHOD = PeftType(
    peft_type="XLORA",
    variants={XLoRA: {}},
    fields=FIELDS,
    suffixes=(),
    read_site=read_site,
    write_site=write_site,
    read_whole=read_whole,
    write_whole=write_whole,
)
