"""The interface of cached attention: a cache of keys and values, and the tokens that one call appends.

A graph with a cache computes only the new tokens of a call; the cache has the keys and values of earlier tokens. Rows
of a batch are independent: each has its own length and its own number of new tokens, and its result equals that of the
row alone. Rows are padded on the right, and padding does not change results.

A decoder may also attend to the outputs of an encoder, which are computed once and stored per row.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lorac.ir.calls.modalities import TOKEN_ARGUMENTS
from lorac.target.memory_budget import Charge


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """The limits of a graph's cache.

    Attributes:
        limit: the longest sequence that the model's positions allow; None if positions have no limit.
        vocabulary: the number of logits per token.
        encodes: names of an encoder's inputs, which must run first; empty without an encoder.
        reads: names of a tower's inputs, whose features replace placeholders in prompts; empty without a tower.
    """

    limit: int | None
    vocabulary: int
    encodes: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()

    @property
    def prompt_inputs(self) -> tuple[str, ...]:
        """The arguments of ``generate`` that pass the images or sounds of prompts."""
        return (*self.reads, *sorted(TOKEN_ARGUMENTS)) if self.reads else ()

    def behind(self, tokens: int) -> "CacheSpec":
        """Return the limits for the tokens that follow a number of virtual tokens."""
        return self if self.limit is None or not tokens else replace(self, limit=self.limit - tokens)

    def after(self, count: int) -> int | None:
        """Return the maximum number of tokens after ``count`` ones; the last is never read. None: no limit."""
        return None if self.limit is None else self.limit + 1 - count


class KeyValueCache(ABC):
    """Keys and values of the rows of a batch (``Engine.new_cache``); only one thread may use it at a time.

    Rows join and leave while others are computed. A row that keeps its place is never copied: the cache has a number of
    places, each with the keys and values of one row, and rows that join get free places.

    Attributes:
        capacity: the maximum number of tokens per row.
        lengths: the number of tokens in each row, without the virtual tokens of its prefix.
        nbytes: the size of the buffers.
        charge: their charge in the engine's memory budget; None if nothing counts it.
        is_croppable: whether a row can drop only its last tokens, which a recurrent state cannot.
    """

    is_croppable: bool = True
    capacity: int
    lengths: tuple[int, ...]
    nbytes: int
    charge: Charge | None = None

    @abstractmethod
    def select(self, rows: Sequence[int]) -> None:
        """Keep the given rows, in this order; a row may be repeated or omitted."""

    @abstractmethod
    def join(self, other: "KeyValueCache") -> None:
        """Append copies of another cache's rows; the capacity becomes the larger one.

        Raises:
            InputMismatch: the other cache belongs to another program, or has encoder outputs of another length.
        """

    def remove(self, rows: Collection[int]) -> list[int]:
        """Remove rows; the last rows move into their places, and all others keep theirs.

        Returns:
            For each remaining row, its former index.
        """
        left = [row for row in range(len(self.lengths)) if row not in rows]
        stay = [row for row in left if row < len(left)]
        behind = iter(left[len(stay) :])
        order = [row if row in stay else next(behind) for row in range(len(left))]
        self.select(order)
        return order

    @abstractmethod
    def crop(self, lengths: Sequence[int]) -> None:
        """Drop each row's tokens from a length on, which must not exceed the current length.

        If the cache is not croppable, a row that drops any token drops all of its tokens.
        """

    @abstractmethod
    def hold_prefix(self, keys_values: Tensor | None) -> None:
        """Make keys and values (2·layers, heads, length, size) the prefix of every row; for None, the present tokens.

        Raises:
            AdapterError: the program has other numbers of layers or heads.
        """

    def set_encoder_outputs(self, outputs: Mapping[str, Tensor]) -> None:
        """Store an encoder's outputs, or a tower's features, per row; {} for text only.

        Raises:
            InputMismatch: the outputs have another number of rows.
            NotImplementedError: the graph does not read such outputs.
        """
        if outputs:
            raise NotImplementedError

    @abstractmethod
    def grow(self, capacity: int = 0, rows: int = 0) -> None:
        """Increase the capacity, or the number of places for rows; keep the content."""

    @abstractmethod
    def copy(self, rows: Sequence[int] | None = None) -> "KeyValueCache":
        """Return another cache with the same content, or with some of its rows.

        Args:
            rows: the rows to copy, in this order; default: all.
        """


@dataclass(frozen=True, eq=False, kw_only=True)
class DecodeStep:
    """New tokens for the rows of a cache.

    Attributes:
        ids: token ids (rows, length), padded on the right.
        counts: the number of new tokens of each row; may be 0.
        wanted: (rows, k): for each row, indices of the new tokens whose logits are returned; for a row without new
            tokens indices and logits are arbitrary.
    """

    ids: Tensor
    counts: Sequence[int]
    wanted: Tensor
