"""The prefix of a row: virtual tokens that a prompt prepends to a sequence, as embeddings or as keys and values."""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorac.errors import AdapterError, InputMismatch, Unavailable
from lorac.ir.sites.site import Site

IDS, MASK = "input_ids", "attention_mask"
"""transformers' argument names for token ids and for the padding mask."""
_SEQUENCES = {MASK: 1, "token_type_ids": 0, "labels": -100}
"""Argument with a value for each token -> PEFT's value for a virtual token."""
_BY_TOKEN = {"logits": 3, "last_hidden_state": 3, "start_logits": 2, "end_logits": 2}
"""Output with a value for each token -> its number of axes."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """The virtual tokens of one adapter.

    Attributes:
        site: the model's input embedding; ids from its vocabulary size on are virtual tokens.
        rows: embeddings (length, d), or the keys and values of each layer.
        attends: whether rows are keys and values, alternating by layer (2·layers, heads, length, size).
    """

    site: Site
    rows: Tensor
    attends: bool = False

    @property
    def length(self) -> int:
        """The number of virtual tokens."""
        return self.rows.shape[-2]

    @property
    def ids(self) -> Tensor:
        """The ids of the virtual tokens (1, length)."""
        first = self.site.in_features
        return torch.arange(first, first + self.length)[None]

    def extend(self, given: Mapping[str, object]) -> dict[str, object]:
        """Prepend the virtual tokens to the arguments of a call, by name.

        Raises:
            InputMismatch: the arguments have no ids, or have values per token without a known value for virtual tokens.
        """
        if self.attends:
            raise Unavailable(
                "the adapter puts keys and values of virtual tokens into a cache, and this program keeps no cache",
                next_step="compile with cache=True for target='onnxruntime', or with target='eager'",
            )
        sizes = {name: tuple(getattr(given.get(name), "shape", ())) for name in (IDS, *_SEQUENCES)}
        if len(sizes[IDS]) != 2 or sizes[MASK] not in {(), sizes[IDS]} or given.get("inputs_embeds") is not None:
            raise InputMismatch(
                f"virtual tokens precede {IDS} (rows, length) and an {MASK} of the same shape, and the call has others",
                next_step="give both, as a tokenizer makes them",
            )
        check_ids(torch.as_tensor(given[IDS]), self.site.in_features, IDS)
        values = {IDS: self.ids, **{name: torch.full((1, self.length), value) for name, value in _SEQUENCES.items()}}
        extended = {**given, **{n: self._join(v, given[n]) for n, v in values.items() if sizes[n] == sizes[IDS]}}
        return extended | self.shift_positions(given, self.length)

    def shift_positions(self, given: Mapping[str, object], new: int = 0) -> dict[str, object]:
        """Shift a call's positions by the virtual tokens; prepend the positions of ``new`` computed virtual tokens."""
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
        """Remove the values of the virtual tokens from a model's output for ``width`` tokens; return the output."""

        def cut(value: Any, axes: int) -> Any:
            by_token = getattr(value, "ndim", 0) == axes and value.shape[1] == self.length + width
            return value[:, self.length :] if by_token else value

        if isinstance(output, tuple):
            return tuple(cut(value, 3) for value in output)
        for name, axes in _BY_TOKEN.items() if isinstance(output, MutableMapping) else ():
            if name in output:
                output[name] = cut(output[name], axes)
        return output


def check_ids(ids: Tensor, vocabulary: int, name: str) -> None:
    """Raise ``InputMismatch`` if an id is outside the model's vocabulary.

    Args:
        vocabulary: number of the model's ids.
        name: the name of the ids in messages.
    """
    for found in (int(ids.min()), int(ids.max())):
        if not 0 <= found < vocabulary:
            raise InputMismatch(
                f"{name} holds {found}, which is not a token id",
                next_step=f"give ids of the model, which go from 0 to {vocabulary - 1}",
            )


def wrong_heads(keys_values: Tensor, layers: int, heads: object, size: object) -> AdapterError:
    """Return the error for keys and values whose layers, heads or size differ from the model's."""
    own_layers, own_heads, _, own_size = keys_values.shape
    return AdapterError(
        f"the adapter has keys and values of {own_layers // 2} layers, {own_heads} heads and {own_size} values each, "
        f"and the model {layers}, {heads} and {size}",
        next_step="load the base model that the adapter was trained on",
        code="shape_mismatch",
    )
