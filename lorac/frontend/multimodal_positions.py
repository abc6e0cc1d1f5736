"""The method of a transformers model that computes the positions of token sequences with images."""

from __future__ import annotations

import inspect

from torch import nn

from lorac.frontend.copying import copy_structure
from lorac.frontend.hugging_face import is_hugging_face
from lorac.ir.multimodal_positions import POSITION_IDS, ROPE_METHOD, MultimodalPositions


def find_multimodal_positions(model: nn.Module) -> MultimodalPositions | None:
    """Return what computes a model's positions; None where forward takes none, or the model has no method for them."""
    if not is_hugging_face(model) or POSITION_IDS not in inspect.signature(model.forward).parameters:
        return None
    owner = next((one for one in (model, model.base_model) if hasattr(one, ROPE_METHOD)), None)
    return None if owner is None else MultimodalPositions(_without_weights(owner))


def _without_weights(model: nn.Module) -> nn.Module:
    copied = copy_structure(model, share_buffers=True)
    for module in copied.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = None if parameter is None else nn.Parameter(parameter.to("meta"), False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to("meta")
    return copied
