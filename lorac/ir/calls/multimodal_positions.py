"""Positions of token sequences that contain images, which a transformers model computes in Python.

The model loops over the kinds of the tokens, which cannot be traced. But a separate method of the model contains this
loop, and forward takes the method's result as an argument. So the positions are an input of the program. For a call
that omits them, lorac calls the model's method, which needs the configuration and no weights.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorac.errors import InputMismatch

POSITION_IDS = "position_ids"
ROPE_METHOD = "get_rope_index"
GRID_SUFFIX = "_grid_thw"
"""Suffix of the names of arguments with the sizes of images. Without images the positions can be traced."""


class MultimodalPositions:
    """Computes the positions of token sequences that contain images.

    Args:
        owner: a model, without its weights, that has the method ``get_rope_index``.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        parameters = inspect.signature(owner.get_rope_index).parameters.values()
        named = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        self._arguments = [p.name for p in named]
        self._required = {p.name for p in named if p.default is p.empty}

    def compute(self, given: Mapping[str, object]) -> Tensor | None:
        """Return the positions for the other arguments of a call; None where forward would not call the method.

        Raises:
            InputMismatch: the model's method fails.
        """
        arguments = {name: _as_tensor(given[name]) for name in self._arguments if given.get(name) is not None}
        if not self._required <= arguments.keys() or not any(name.endswith(GRID_SUFFIX) for name in arguments):
            return None
        try:
            with torch.no_grad():
                positions: Tensor = self._owner.get_rope_index(**arguments)[0]
        except Exception as error:
            raise InputMismatch(
                f"the model's own {ROPE_METHOD}() finds no {POSITION_IDS}: {type(error).__name__}: {error}",
                next_step=f"give {', '.join(arguments)} that fit one another, as its processor makes them",
            ) from error
        return positions

    @property
    def call(self) -> str:
        """The call of the model's method, as Python."""
        return f"{ROPE_METHOD}({', '.join(self._arguments)})[0]"


def _as_tensor(value: object) -> object:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value
