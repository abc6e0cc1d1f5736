"""How a captured program is called: the host's inputs by name, and its own output type back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from lorac.errors import ChoiceError, nearest_name


@dataclass(frozen=True, eq=False)
class CallSignature:
    """Inputs and outputs of the host as an emitted program has them.

    Attributes:
        inputs: names of the program's inputs, in order.
        arguments: names of the host's arguments, in the order of positional calls.
        out_spec: pytree of the host's output; None where only names are known.
        outputs: names of the program's outputs, the host's own first.
        extra: names of the extra outputs behind them.
    """

    inputs: tuple[str, ...]
    arguments: tuple[str, ...]
    outputs: tuple[str, ...]
    out_spec: Any = None
    extra: tuple[str, ...] = ()

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Program input -> value, for one call.

        Raises:
            ChoiceError: an argument the program was not captured with, or a missing one.
        """
        given = {**dict(zip(self.arguments, args, strict=False)), **{k: v for k, v in kwargs.items() if v is not None}}
        given = {name: value for name, value in given.items() if value is not None}
        flags = {name for name, value in given.items() if isinstance(value, bool | str)}
        unknown = [name for name in given if name not in self.inputs and name not in flags]
        if unknown:
            raise ChoiceError(
                f"the compiled program has no input '{unknown[0]}'",
                nearest=nearest_name(unknown[0], self.inputs) or ", ".join(self.inputs),
                next_step="give it in example_inputs= when compiling",
            )
        for name in self.inputs:
            if name not in given:
                given[name] = self._default(name, given)
        return {name: given[name] for name in self.inputs}

    def answer(self, values: list[Any]) -> tuple[Any, dict[str, Any]]:
        """The host's output object, and the extra outputs by name."""
        own = values[: len(values) - len(self.extra)]
        extra = dict(zip(self.extra, values[len(own) :], strict=True))
        if self.out_spec is None:
            return dict(zip(self.outputs, own, strict=False)), extra
        return pytree.tree_unflatten(own, self.out_spec), extra

    def _default(self, name: str, given: Mapping[str, Any]) -> Any:
        """An attention mask may be left out, as the host allows: it is all ones."""
        ids = given.get(name.replace("attention_mask", "input_ids"))
        if name.endswith("attention_mask") and ids is not None:
            return np.ones_like(ids) if isinstance(ids, np.ndarray) else torch.ones_like(ids)
        raise ChoiceError(
            f"the compiled program needs the input '{name}'",
            next_step=f"it takes {', '.join(self.inputs)}",
        )
