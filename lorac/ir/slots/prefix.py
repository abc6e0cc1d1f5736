"""The prefix of a row: virtual tokens that a prompt puts before a sequence, as embeddings or as keys and values."""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorac.errors import AdapterError, InputMismatch, Unavailable
from lorac.ir.sites.site import Site

IDS, MASK = "input_ids", "attention_mask"
_SEQUENCES = {MASK: 1, "token_type_ids": 0, "labels": -100}
"""Argument with a value for each token -> its value for a virtual one, which is PEFT's."""
_BY_TOKEN = {"logits": 3, "last_hidden_state": 3, "start_logits": 2, "end_logits": 2}
"""Output with a value for each token -> its number of axes."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """The virtual tokens of one adapter.

    Attributes:
        site: the model's input embedding; ids from its number of tokens on are virtual ones.
        embeddings: (length, d); None where the keys and values are given.
        keys_values: keys and values of each layer by turns (2·layers, heads, length, size); None for embeddings.
    """

    site: Site
    embeddings: Tensor | None = None
    keys_values: Tensor | None = None

    @property
    def length(self) -> int:
        """The number of virtual tokens."""
        if self.keys_values is not None:
            return self.keys_values.shape[2]
        assert self.embeddings is not None
        return len(self.embeddings)

    @property
    def ids(self) -> Tensor:
        """The ids of the virtual tokens (1, length)."""
        first = self.site.in_features
        return torch.arange(first, first + self.length)[None]

    def extend(self, given: Mapping[str, object]) -> dict[str, object]:
        """Return the arguments of a call by name, with the virtual tokens before the tokens of each row.

        Raises:
            InputMismatch: they hold no ids, or something by token that has no value for virtual ones.
        """
        ids = given.get(IDS)
        if ids is None or given.get("inputs_embeds") is not None:
            raise InputMismatch(
                "an adapter with virtual tokens needs the ids of the others", next_step="give input_ids=, no embeddings"
            )
        if self.keys_values is not None:
            raise Unavailable(
                "keys and values of virtual tokens stand in a cache, and this program keeps none",
                next_step="compile with cache=True for target='onnxruntime', or with target='eager'",
            )
        tokens = torch.as_tensor(ids)
        if tokens.numel() and int(tokens.max()) >= self.site.in_features:
            raise InputMismatch(
                f"{IDS} holds {int(tokens.max())}, which is not a token id",
                next_step=f"the model's ids go from 0 to {self.site.in_features - 1}",
            )
        rows, width = tokens.shape
        extended = {**given, IDS: self._join(self.ids, ids)}
        for name, value in _SEQUENCES.items():
            found = given.get(name)
            if found is not None and torch.as_tensor(found).shape == (rows, width):
                extended[name] = self._join(torch.full((1, self.length), value), found)
            elif found is not None and name == MASK:
                raise InputMismatch(
                    f"attention_mask has {torch.as_tensor(found).dim()} axes, and virtual tokens need one of two",
                    next_step="give (rows, length), 1 for each token",
                )
        return extended | self.shift_positions(given, self.length)

    def shift_positions(self, given: Mapping[str, object], new: int = 0) -> dict[str, object]:
        """Return the positions of a call behind the virtual tokens, the last ``new`` of which the call computes too."""
        found = given.get("position_ids")
        if found is None:
            return {}
        behind = torch.as_tensor(found) + self.length
        return {"position_ids": self._join(torch.arange(new)[None], behind) if new else behind}

    def _join(self, before: Tensor, given: object) -> object:
        tokens = torch.as_tensor(given)
        joined = torch.cat([before.to(tokens).expand(len(tokens), -1), tokens], 1)
        return joined if isinstance(given, Tensor) else joined.numpy()

    def trim(self, output: Any, width: int) -> Any:
        """Remove the values of the virtual tokens from a model's output of ``width`` tokens and them; return it."""

        def cut(value: Any, axes: int) -> Any:
            by_token = getattr(value, "ndim", 0) == axes and value.shape[1] == self.length + width
            return value[:, self.length :] if by_token else value

        if isinstance(output, tuple):
            return tuple(cut(value, 3) for value in output)
        for name, axes in _BY_TOKEN.items() if isinstance(output, MutableMapping) else ():
            if name in output:
                output[name] = cut(output[name], axes)
        return output


def wrong_heads(keys_values: Tensor, layers: int, heads: object, size: object) -> AdapterError:
    """Return the error for keys and values of another model than one of these layers and heads."""
    own_layers, own_heads, _, own_size = keys_values.shape
    return AdapterError(
        f"the adapter has keys and values of {own_layers // 2} layers, {own_heads} heads and {own_size} values each, "
        f"and the model {layers}, {heads} and {size}",
        next_step="load the base model that the adapter was trained on",
        code="shape_mismatch",
    )
