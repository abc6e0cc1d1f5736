"""Models of transformers, recognised without importing it, and their configurations."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeGuard

from torch import nn

from lorac.ir.fixed_arguments import CAPTURE_CONFIG

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRACE_CONFIG = CAPTURE_CONFIG | {"_experts_implementation": "batched_mm"}
"""Fields set during a trace: experts are multiplied by ops that every target has, not by kernels for token groups."""


def is_hugging_face(model: nn.Module) -> TypeGuard[PreTrainedModel]:
    """Return whether ``model`` is a transformers model; does not import transformers."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def set_config_fields(model: nn.Module, fields: Mapping[str, object] = CAPTURE_CONFIG) -> None:
    """Set fields of all configurations of a transformers model's modules that have them.

    Args:
        model: a copy, whose configurations are its own.
        fields: name -> value.
    """
    configs = (getattr(module, "config", None) for module in model.modules()) if is_hugging_face(model) else ()
    for config, (name, value) in itertools.product(configs, fields.items()):
        if hasattr(config, name):
            setattr(config, name, value)
