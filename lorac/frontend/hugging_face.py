"""Models of transformers, recognised without importing it, and their configurations."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeGuard

from torch import nn

from lorac.ir.calls.fixed_arguments import CAPTURE_CONFIG

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRACE_CONFIG = CAPTURE_CONFIG | {"_experts_implementation": "batched_mm"}
"""Fields set during a trace: experts are multiplied by ops that every target has, not by kernels for token groups."""

TIES = "tie_word_embeddings"
"""Field of a configuration: whether the input's and the output's embedding are one tensor."""


def is_hugging_face(model: nn.Module) -> TypeGuard[PreTrainedModel]:
    """Return whether ``model`` is a transformers model; does not import transformers."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def find_encoders(model: nn.Module) -> list[nn.Module]:
    """Return the encoder that a transformers model's ``generate`` calls by itself; none for a model without one."""
    if not is_hugging_face(model) or not getattr(model.config, "is_encoder_decoder", False):
        return []
    return [model.get_encoder()]


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


def record_untied_weights(model: nn.Module) -> None:
    """Make the configuration of a transformers model agree with its weights, some of which are tied no longer.

    Where none is tied, ``tie_word_embeddings`` becomes False, which every reader of a checkpoint goes by. It stays as
    it is where the model computes by it (Switch scales its outputs): transformers does not tie weights that a
    checkpoint holds under both names with different values.

    Args:
        model: a copy, whose configurations are its own.
    """
    if not is_hugging_face(model):
        return
    known = dict(model.named_parameters(remove_duplicate=False))
    tied = {name: source for name, source in model.all_tied_weights_keys.items() if known[name] is known[source]}
    if len(tied) == len(model.all_tied_weights_keys):
        return
    model.all_tied_weights_keys = tied
    if not tied and not _computes_by_ties(model):
        set_config_fields(model, {TIES: False})


def _computes_by_ties(model: PreTrainedModel) -> bool:
    """Return whether a forward of the model, or another field of its configuration, depends on ``TIES``."""
    fields = {**model.config.to_dict(), TIES: False}
    if type(model.config).from_dict(fields).to_dict() != fields:
        return True
    forwards = {inspect.unwrap(type(module).forward) for module in model.modules()}
    return any(TIES in forward.__code__.co_names for forward in forwards if inspect.isfunction(forward))


def forget_quantisation(model: nn.Module) -> None:
    """Remove what says that a transformers model is quantised, once its weights are floats.

    Args:
        model: a copy, whose configuration is its own.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
