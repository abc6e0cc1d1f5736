"""A structural copy of a model: own modules, flags and hooks; shared weight storage."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def structural_copy(model: Model, *, share_buffers: bool = False) -> Model:
    """``model`` again, module by module, over the same weight storage and with every ``requires_grad`` off.

    Parameters become new ``nn.Parameter`` objects that share the host's storage, one per distinct parameter: ties stay
    ties, and flags set on the copy leave the model as it was. Parameters of a subclass (quantised ones, say) are shared
    as they are, since a plain ``nn.Parameter`` would lose what they carry.

    Args:
        model: the host; not touched.
        share_buffers: share buffers too, for a copy that will never train (batch statistics are written in training).
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor | torch.Generator):
                memo[id(value)] = value
        for value in module._buffers.values():
            if share_buffers and value is not None:
                memo[id(value)] = value
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                plain = type(parameter) is nn.Parameter
                memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False) if plain else parameter
    return copy.deepcopy(model, memo)
