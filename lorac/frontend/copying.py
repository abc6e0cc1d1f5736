"""A structural copy of a model: own modules, flags and hooks; shared weight storage."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lorac.errors import CaptureError

Model = TypeVar("Model", bound=nn.Module)


def copy_structure(model: Model, *, share_buffers: bool = False) -> Model:
    """``model`` again, module by module, over the same weight storage and with every ``requires_grad`` off.

    Parameters become new ``nn.Parameter`` objects that share the host's storage, one per distinct parameter: ties stay
    ties, and flags set on the copy leave the model as it was. Parameters of a subclass (quantised ones, say) are shared
    as they are, since a plain ``nn.Parameter`` would lose what they carry.

    Args:
        model: the host; not touched.
        share_buffers: share buffers too, for a copy that will never train (batch statistics are written in training).

    Raises:
        CaptureError: something that the model holds cannot be copied.
    """
    attributes = (value for module in model.modules() for value in vars(module).values())
    shared: list[Any] = [value for value in attributes if isinstance(value, Tensor | torch.Generator)]
    if share_buffers:
        shared.extend(model.buffers())
    memo: dict[int, Any] = {id(value): value for value in shared}
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter
        new = nn.Parameter(parameter.detach(), requires_grad=False) if plain else parameter
        memo.setdefault(id(parameter), new)
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever the objects that a model holds make of being copied
        raise CaptureError(
            f"{type(model).__name__} cannot be copied: {error}",
            next_step="copy.deepcopy(model) shows what in it cannot be; hold that outside of the model",
            code="capture_failed",
        ) from error
