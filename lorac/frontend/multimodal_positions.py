"""Positions of text with images in it, which a model of transformers makes of its other arguments in Python.

It goes through the kinds of the tokens one by one, where no trace can follow; but it has a method for that alone, and
takes what that answers as an argument. So a program has the positions as an input, and a call that leaves them out gets
those of the model's own method, which needs its configuration and none of its weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorac.errors import InputMismatch
from lorac.frontend.copying import copy_structure
from lorac.frontend.example_inputs import is_hugging_face

POSITION_IDS = "position_ids"
_METHOD = "get_rope_index"
GRID_SUFFIX = "_grid_thw"
"""How the names of arguments end that say how large images are. Text alone has positions that a trace can follow."""


class MultimodalPositions:
    """Makes the positions of text with images.

    Args:
        owner: a model that has the method; a copy of it without its weights is kept.
    """

    def __init__(self, owner: nn.Module) -> None:
        self._owner: Any = _without_weights(owner)
        parameters = inspect.signature(self._owner.get_rope_index).parameters.values()
        self._takes = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        self._needs = {p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty}

    @classmethod
    def of(cls, model: Any) -> MultimodalPositions | None:
        """What makes the positions of a model; None where it takes none, or has no method for them."""
        if not is_hugging_face(model) or POSITION_IDS not in inspect.signature(model.forward).parameters:
            return None
        owner = next((one for one in (model, model.base_model) if hasattr(one, _METHOD)), None)
        return None if owner is None else cls(owner)

    def made(self, given: Mapping[str, Any]) -> Tensor | None:
        """The positions for the other arguments of a call; None where forward would not ask for them.

        Raises:
            InputMismatch: the model's method fails.
        """
        own = {name: _as_tensor(given[name]) for name in self._takes if given.get(name) is not None}
        if not self._needs <= own.keys() or not any(name.endswith(GRID_SUFFIX) for name in own):
            return None
        try:
            with torch.no_grad():
                found: Tensor = self._owner.get_rope_index(**own)[0]
        except Exception as error:
            raise InputMismatch(
                f"the model's own {_METHOD}() finds no {POSITION_IDS}: {type(error).__name__}: {error}",
                next_step=f"give {', '.join(own)} that fit one another, as its processor makes them",
            ) from error
        return found

    @property
    def call(self) -> str:
        """How the model is asked for them, as Python."""
        return f"{_METHOD}({', '.join(self._takes)})[0]"


def _as_tensor(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _without_weights(model: nn.Module) -> Any:
    copied = copy_structure(model, share_buffers=True)
    for module in copied.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = None if parameter is None else nn.Parameter(parameter.to("meta"), False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to("meta")
    return copied
