"""The contract for cached attention: a cache of keys and values, and the tokens that one call adds to it.

A graph with a cache computes only the new tokens of a call; the keys and values of earlier tokens are in the cache.
Rows of a batch are independent: each has its own length, brings its own number of tokens, and gets the answer that it
would get alone. Rows are padded on the right, and padding changes no answer.

A decoder may also attend to the outputs of an encoder. These are computed once, and stored for each row.
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
        limit: the longest sequence that the model's positions admit; None where they are computed for any.
        vocabulary: number of logits of a token.
        encodes: names of the inputs of an encoder, which must run first; empty without an encoder.
        reads: names of the inputs of a tower, whose features stand in prompts; empty without a tower.
    """

    limit: int | None
    vocabulary: int
    encodes: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()

    @property
    def prompt_inputs(self) -> tuple[str, ...]:
        """The arguments of ``generate`` with the images or sounds of prompts."""
        return (*self.reads, *sorted(TOKEN_ARGUMENTS)) if self.reads else ()

    def behind(self, tokens: int) -> "CacheSpec":
        """Return the limits of the tokens behind some virtual ones."""
        return self if self.limit is None or not tokens else replace(self, limit=self.limit - tokens)

    def after(self, count: int) -> int | None:
        """Return how many tokens may follow ``count`` ones, the last of which nothing reads; None for any number."""
        return None if self.limit is None else self.limit + 1 - count


class KeyValueCache(ABC):
    """Keys and values of the rows of a batch (``Engine.new_cache``). Only one thread may use it at a time.

    Rows come and go while others are computed. A row that stays in its place is never copied: its keys and values lie
    in one of the places that the cache has room for, and rows that join take free ones.

    Attributes:
        capacity: the most tokens of a row.
        lengths: number of tokens in each row, without the virtual tokens of its prefix.
        nbytes: size of its buffers.
        charge: their memory in the engine's budget; None where nothing counts it.
        is_croppable: whether a row can lose its last tokens alone, which a state cannot.
    """

    is_croppable: bool = True
    capacity: int
    lengths: tuple[int, ...]
    nbytes: int
    charge: Charge | None = None

    @abstractmethod
    def select(self, rows: Sequence[int]) -> None:
        """Replace the rows by some of them, in this order; a row may be repeated or left out."""

    @abstractmethod
    def join(self, other: "KeyValueCache") -> None:
        """Add copies of another cache's rows behind the rows; the capacity becomes the larger of both.

        Raises:
            InputMismatch: the other cache is of another program, or holds encoder outputs of another length.
        """

    def remove(self, rows: Collection[int]) -> list[int]:
        """Drop some rows. The last rows take their places, and all others keep theirs.

        Returns:
            For each row that is left, the row that it was.
        """
        left = [row for row in range(len(self.lengths)) if row not in rows]
        stay = [row for row in left if row < len(left)]
        behind = iter(left[len(stay) :])
        order = [row if row in stay else next(behind) for row in range(len(left))]
        self.select(order)
        return order

    @abstractmethod
    def crop(self, lengths: Sequence[int]) -> None:
        """Drop each row's tokens from a length on, which is at most the present one.

        Where a cache is not croppable, a row that loses some tokens loses all.
        """

    @abstractmethod
    def hold_prefix(self, keys_values: Tensor | None) -> None:
        """Make keys and values (2·layers, heads, length, size) the prefix of every row; None: those of its tokens.

        Raises:
            AdapterError: the program has other layers or heads.
        """

    def set_encoder_outputs(self, outputs: Mapping[str, Tensor]) -> None:
        """Store an encoder's outputs, or a tower's features, for each row, in the place of earlier ones; {} for text.

        Raises:
            InputMismatch: they have another number of rows.
            NotImplementedError: the graph reads none.
        """
        if outputs:
            raise NotImplementedError

    @abstractmethod
    def grow(self, capacity: int = 0, rows: int = 0) -> None:
        """Increase the capacity, or the number of rows that there is room for; the content stays."""

    @abstractmethod
    def copy(self, rows: Sequence[int] | None = None) -> "KeyValueCache":
        """Return another cache with the same content.

        Args:
            rows: which rows it has, in this order; default: all.
        """


@dataclass(frozen=True, eq=False, kw_only=True)
class DecodeStep:
    """New tokens for the rows of a cache.

    Attributes:
        ids: token ids (rows, length), padded on the right.
        counts: number of new tokens of each row, 0 included.
        wanted: (rows, k): indices among the row's new tokens whose logits are returned; for a row without new tokens
            both are arbitrary.
    """

    ids: Tensor
    counts: Sequence[int]
    wanted: Tensor
