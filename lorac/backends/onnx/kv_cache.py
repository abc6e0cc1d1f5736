"""Caches of emitted programs: one buffer per layer that a library reads, and calls that append tokens to its rows.

A library that writes new tokens into the buffer uses one memory for past and present, so the cost of a call depends
only on its new tokens. A library that returns new tokens instead reads all memory of a row. Therefore such memory grows
with the rows, and is zero after their tokens.
"""

import functools
import math
import operator
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lorac.errors import ChoiceError, InputMismatch, Unavailable
from lorac.ir.calls.modalities import pad_rows
from lorac.ir.graph.attention_ops import (
    DECODER_IDS,
    IDS,
    LOGITS_TO_KEEP,
    NEW_LENGTHS,
    PAST_LENGTHS,
    PRESENT_PREFIX,
    find_token_input,
    is_encoder_output,
    is_past_input,
    past_names,
)
from lorac.ir.graph.feeds import CacheInputShape, convert_input
from lorac.ir.slots.prefix import wrong_heads
from lorac.target.kv_cache import CacheSpec, DecodeStep, KeyValueCache
from lorac.target.memory_budget import Charge, MemoryBudget

_MASK = "attention_mask"
_LEAST_ROOM = 64
"""Tokens that buffers which a library reads whole have room for at first."""
BindingT = TypeVar("BindingT")


@dataclass(frozen=True)
class CacheLayout:
    """The inputs and outputs of a graph that form its cache.

    Attributes:
        shapes: input of a layer's keys or values, or of a state -> its sizes and dtype.
        spec: the limits of the cache.
        logits: the name of the output with the logits, and its dtype.
        keeps_some: whether the graph computes only the logits of chosen tokens; otherwise it computes all.
        token_input: the name of the input with the new tokens.
        encoder_outputs: the inputs for the encoder's outputs.
        read_whole: whether a call reads whole buffers and returns the new tokens' entries; otherwise it writes these
            into the buffers, and reads only filled entries.
    """

    shapes: Mapping[str, CacheInputShape]
    spec: CacheSpec
    logits: tuple[str, torch.dtype]
    keeps_some: bool
    token_input: str
    encoder_outputs: Mapping[str, CacheInputShape]
    read_whole: bool = False

    @classmethod
    def of(
        cls,
        inputs: Mapping[str, CacheInputShape],
        outputs: Mapping[str, CacheInputShape],
        longest: str | None,
        *,
        read_whole: bool = False,
    ) -> "CacheLayout | None":
        """Return the layout of a graph; None for a graph without a cache.

        Args:
            inputs, outputs: the graph's inputs and outputs.
            longest: the longest sequence that its positions allow, from the model's metadata.
        """
        if PAST_LENGTHS not in inputs:
            return None
        name, (sizes, dtype) = next(item for item in outputs.items() if not item[0].startswith(PRESENT_PREFIX))
        limit, tokens = None if longest is None else int(longest), find_token_input(inputs)
        vocabulary = sizes[-1]
        assert vocabulary is not None

        def shapes_of(holds: Callable[[str], bool]) -> dict[str, CacheInputShape]:
            """Return the shapes of the inputs whose names hold."""
            return {name: shape for name, shape in inputs.items() if holds(name)}

        return cls(
            shapes=shapes_of(is_past_input),
            spec=CacheSpec(limit=limit, vocabulary=vocabulary),
            logits=(name, dtype),
            keeps_some=LOGITS_TO_KEEP in inputs,
            token_input=tokens,
            encoder_outputs=shapes_of(is_encoder_output),
            read_whole=read_whole,
        )

    def behind(self, inputs: tuple[str, ...]) -> "CacheLayout":
        """Return the layout of a graph that runs after an encoder or a tower with these inputs."""
        names: dict[str, Any] = {"reads" if self.token_input == IDS else "encodes": inputs}
        return replace(self, spec=replace(self.spec, **names))

    @functools.cached_property
    def states(self) -> frozenset[str]:
        """The inputs of recurrent states, whose size does not depend on the number of tokens."""
        return frozenset(name for name, (sizes, _) in self.shapes.items() if None not in sizes[1:])

    def entries(self, name: str, count: int) -> slice:
        """Return the slice of an input's third axis with the first ``count`` tokens; for a state, the whole axis."""
        return slice(None if name in self.states else count)

    def _measure(self, name: str, room: int) -> tuple[int, ...]:
        return tuple(room if size is None else size for size in self.shapes[name][0][1:])

    def without_features(self, rows: int) -> dict[str, Tensor]:
        """Return zeros as the encoder's features, for rows without images or sounds."""
        sizes = self.encoder_outputs.items() if self.spec.reads else ()
        return {name: torch.zeros(rows, 1, size or 1, dtype=dtype) for name, ((*_, size), dtype) in sizes}

    def allocate(self, rows: int, room: int) -> dict[str, Tensor]:
        """Return buffers with room for so many tokens per row; pages that are never written use no memory."""
        return {n: torch.zeros(rows, *self._measure(n, room), dtype=dtype) for n, (_, dtype) in self.shapes.items()}

    def measure(self, rows: int, room: int) -> int:
        """Return the size in bytes of such buffers."""
        sizes = (math.prod(self._measure(name, room)) * dtype.itemsize for name, (_, dtype) in self.shapes.items())
        return rows * sum(sizes)

    def check_length(self, count: int) -> None:
        """Raise ``InputMismatch`` if a sequence has more tokens than the model has positions."""
        limit = self.spec.limit
        if limit is not None and count > limit:
            raise InputMismatch(
                f"{count} tokens are more than the model has positions for: {limit}", next_step="give shorter texts"
            )


class BufferedCache(KeyValueCache, Generic[BindingT]):
    """Keys, values and states in buffers that a library reads.

    The rows are the first places of a memory that may have more places, so rows join and leave without copying others.

    Args:
        rows: the initial number of rows.
        capacity: the maximum number of tokens per row.
        budget: the budget that counts its memory.

    Attributes:
        buffers: input of a layer's keys or values, or of a state -> the part of the memory that holds the rows.
        prefixes: the number of virtual tokens before each row's tokens.
        encoder_outputs: input -> the encoder's outputs for each row.
    """

    def __init__(self, layout: CacheLayout, rows: int, capacity: int, budget: MemoryBudget | None = None) -> None:
        self.layout, self.capacity, self.lengths = layout, capacity, (0,) * rows
        self.is_croppable = not layout.states
        self.prefixes = (0,) * rows
        self.budget = MemoryBudget() if budget is None else budget
        self.charge: Charge = self.budget.claim(layout.measure(rows, capacity))
        self._memory = layout.allocate(rows, 0 if layout.read_whole else capacity)
        self._used = [0] * rows  # number of tokens whose entries in each place may be nonzero
        self.buffers: Mapping[str, Tensor] = self._memory
        self.encoder_outputs: Mapping[str, Tensor] = layout.without_features(rows)
        self._encoded_charge = self.budget.charge(())
        self._encoded_rows = tuple(range(rows))
        self._inputs: dict[str, Tensor] = {}
        self._binding: tuple[weakref.ref[object], weakref.ref[object], BindingT] | None = None
        self._is_bound = False

    @property
    def nbytes(self) -> int:  # type: ignore[override]  # computed on request
        """The size in bytes of all buffers, including free places."""
        return sum(tensor.nbytes for tensor in (*self._memory.values(), *self.encoder_outputs.values()))

    @property
    def filled(self) -> tuple[int, ...]:
        """The number of tokens of each row, including virtual ones."""
        return tuple(map(operator.add, self.prefixes, self.lengths))

    def hold_prefix(self, keys_values: Tensor | None) -> None:
        if keys_values is None:
            self.prefixes, self.lengths = self.filled, (0,) * len(self.lengths)
            return
        layers, heads, length, size = keys_values.shape
        shapes = [shape for name, (shape, _) in self.layout.shapes.items() if name not in self.layout.states]
        other = [shape[1::2] for shape in shapes if shape[1::2] != (heads, size)]
        if other or len(shapes) != layers:
            raise wrong_heads(keys_values, len(shapes) // 2, *(other[0] if other else (heads, size)))
        self.prefixes = (length,) * len(self.lengths)
        self.reserve(length)
        self._note_used(range(len(self.lengths)), length)
        for layer in range(layers // 2):
            for name, given in zip(past_names(layer), keys_values[2 * layer : 2 * layer + 2], strict=True):
                self.buffers[name][:, :, :length] = given.to(self.buffers[name].dtype)

    def set_encoder_outputs(self, outputs: Mapping[str, Tensor]) -> None:
        rows = len(next(iter(outputs.values()), self.lengths))
        if rows != len(self.lengths):
            raise InputMismatch(
                f"the encoder's inputs have {rows} rows, and the text has {len(self.lengths)}",
                next_step="give one of each per row",
            )
        self._set_encoded({**self.layout.without_features(rows), **outputs})
        self._encoded_rows, self._is_bound = tuple(range(rows)), False

    def _set_encoded(self, outputs: Mapping[str, Tensor]) -> None:
        self._encoded_charge = self.budget.charge(outputs.values())
        self.encoder_outputs = outputs

    def select(self, rows: Sequence[int]) -> None:
        rows = list(rows)
        if rows == list(range(len(self.lengths))):
            return
        moved = {place: row for place, row in enumerate(rows) if place != row}
        longest = max((self.filled[row] for row in moved.values()), default=0)
        self._allocate(len(rows), self._room)
        for name, memory in self._memory.items():
            # Indexing copies, so no row is overwritten before it is moved.
            part = self.layout.entries(name, longest)
            memory[list(moved), :, part] = memory[list(moved.values()), :, part]
        self._note_used(moved, longest)
        encoded = tuple(self._encoded_rows[row] for row in rows)
        if encoded != self._encoded_rows:  # beams of one row share its encoder outputs
            index = torch.tensor(rows, dtype=torch.int64)
            self._set_encoded({n: value.index_select(0, index) for n, value in self.encoder_outputs.items()})
        self.prefixes = tuple(self.prefixes[row] for row in rows)
        self._set_rows(tuple(self.lengths[row] for row in rows), encoded)

    def join(self, other: KeyValueCache) -> None:
        first = len(self.lengths)
        if not isinstance(other, BufferedCache) or other.layout.shapes != self.layout.shapes:
            raise InputMismatch("the other cache belongs to another program", next_step="join caches of one graph")
        own, added = self.encoder_outputs, other.encoder_outputs
        sizes = [{name: value.shape[1:] for name, value in outputs.items()} for outputs in (own, added)]
        if not self.lengths or not other.lengths:
            outputs = dict(own if self.lengths else added)
        elif self.layout.spec.reads:
            outputs = {name: pad_rows([*value, *added[name]]) for name, value in own.items()}
        elif sizes[0] == sizes[1]:
            outputs = {name: torch.cat([value, added[name]]) for name, value in own.items()}
        else:
            raise InputMismatch(
                "the rows of the other cache hold encoder outputs of another length",
                next_step="pad the encoder's inputs of all rows to one length",
            )
        rows, longest = first + len(other.lengths), max(other.filled, default=0)
        self.capacity = max(self.capacity, other.capacity)
        places = next(iter(self._memory.values())).shape[0]
        # Double the places, so that rows which join one at a time are not copied each time.
        prefix = max((*self.prefixes, *other.prefixes), default=0)
        self._allocate(rows if rows <= places else max(rows, 2 * places), max(self._planned_room(prefix), longest))
        for name, memory in self._memory.items():
            part = self.layout.entries(name, longest)
            memory[first:rows, :, part] = other.buffers[name][:, :, part]
        self._note_used(range(first, rows), longest)
        self._set_encoded(outputs)
        self.prefixes += other.prefixes
        behind = max(self._encoded_rows, default=-1) + 1
        self._set_rows(
            (*self.lengths, *other.lengths), (*self._encoded_rows, *(behind + row for row in other._encoded_rows))
        )

    def crop(self, lengths: Sequence[int]) -> None:
        assert all(new <= old for new, old in zip(lengths, self.lengths, strict=True))
        shorter = [row for row, (new, old) in enumerate(zip(lengths, self.lengths, strict=True)) if new < old]
        self.lengths = tuple(lengths)
        if shorter and not self.is_croppable:
            self.clear(shorter)

    def clear(self, rows: Sequence[int]) -> None:
        """Drop all tokens of rows whose states include dropped tokens, or tokens of a failed call."""
        if any(self.prefixes[row] for row in rows):
            raise Unavailable(
                "the state of a hybrid model cannot be set back to the end of an adapter's virtual tokens",
                next_step="generate without prompt_cache= and draft=, or begin with a new cache",
            )
        self.lengths = tuple(0 if row in rows else length for row, length in enumerate(self.lengths))
        for name in self.layout.states:
            self.buffers[name][list(rows)] = 0

    def grow(self, capacity: int = 0, rows: int = 0) -> None:
        self.capacity = max(capacity, self.capacity)
        self._allocate(max(rows, len(self.lengths)), self._planned_room(max(self.prefixes, default=0)))
        self.charge.resize(self._count_bytes(len(next(iter(self._memory.values()))), self._room))

    def copy(self, rows: Sequence[int] | None = None) -> "BufferedCache[BindingT]":
        rows = list(range(len(self.lengths)) if rows is None else rows)
        most = self.capacity + max(self.prefixes, default=0)
        copied: BufferedCache[BindingT] = BufferedCache(self.layout, len(rows), most, self.budget)
        copied.capacity = self.capacity
        longest = max((self.filled[row] for row in rows), default=0)
        copied.reserve(longest)
        copied._note_used(range(len(rows)), longest)
        copied.lengths = tuple(self.lengths[row] for row in rows)
        copied.prefixes = tuple(self.prefixes[row] for row in rows)
        for name, memory in copied._memory.items() if longest else ():
            part = self.layout.entries(name, longest)
            memory[:, :, part] = self.buffers[name][rows, :, part]
        copied._encoded_rows = tuple(self._encoded_rows[row] for row in rows)
        same = copied._encoded_rows == self._encoded_rows  # encoder outputs are never overwritten
        copied._set_encoded({n: value if same else value[rows] for n, value in self.encoder_outputs.items()})
        return copied

    def reserve(self, length: int) -> None:
        """Allocate buffers long enough for rows of a length, including padding."""
        most = self.capacity + max(self.prefixes, default=0)
        doubled = max(_LEAST_ROOM, 1 << (length - 1).bit_length()) if self.layout.read_whole and length else length
        self._allocate(len(self.lengths), max(length, min(most, doubled)))

    def clear_unused(self, counts: Sequence[int]) -> None:
        """Write zeros after the tokens of rows that were longer before, if calls read whole buffers.

        Args:
            counts: the number of tokens that the call will append to each row.
        """
        for row, (filled, used, new) in enumerate(zip(self.filled, self._used, counts, strict=False)):
            for name, memory in self._memory.items() if self.layout.read_whole and used > filled else ():
                if name not in self.layout.states:
                    memory[row, :, filled:used] = 0
            self._used[row] = filled + new

    def write_inputs(self, ids: Mapping[str, Tensor], counts: Mapping[str, Sequence[int]]) -> Mapping[str, Tensor]:
        """Write a call's small inputs into memory that stays the same, and so bound, as long as their sizes do.

        Args:
            ids: ids or indices, by the name of the input; stored as int64.
            counts: a number for each row, by the name of the input; stored as int32.
        """
        for name, value in ids.items():
            self._input(name, tuple(value.shape), torch.int64).copy_(value)
        for name, numbers in counts.items():
            self._input(name, (len(numbers),), torch.int32).numpy()[:] = numbers
        return self._inputs

    def _input(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if name not in self._inputs or self._inputs[name].shape != shape:
            self._inputs[name] = torch.empty(shape, dtype=dtype)
        return self._inputs[name]

    def _note_used(self, places: Iterable[int], length: int) -> None:
        for place in places:
            self._used[place] = max(self._used[place], length)

    @property
    def _room(self) -> int:
        """The number of tokens that each place has memory for; unlimited if the cache has only states."""
        grown = (memory.shape[2] for name, memory in self._memory.items() if name not in self.layout.states)
        return next(grown, sys.maxsize)

    def _planned_room(self, prefix: int) -> int:
        """Return the room for rows of the capacity; buffers that calls read whole grow only when rows need it."""
        return self._room if self.layout.read_whole else self.capacity + prefix

    def _allocate(self, places: int, room: int) -> None:
        """Allocate enough memory; copy its content only if it has to grow."""
        before = next(iter(self._memory.values())).shape[0], self._room
        places, room = max(places, before[0]), max(room, before[1])
        if (places, room) == before:
            return
        size, rows, longest = self._count_bytes(places, room), len(self.lengths), max(self.filled, default=0)
        # Memory that is read whole grows within its counted size, so a growing row never exceeds the budget.
        self.charge.resize(size if self.layout.read_whole else self.layout.measure(*before) + size)
        larger = self.layout.allocate(places, room)
        for name, memory in self._memory.items():
            part = self.layout.entries(name, longest)
            larger[name][:rows, :, part] = memory[:rows, :, part]
        self._memory = larger
        self._used += [0] * (places - before[0])
        self._set_rows(self.lengths, self._encoded_rows)
        self.charge.resize(size)

    def _count_bytes(self, places: int, room: int) -> int:
        """Return the buffers' size; those that calls read whole count as if all places had the full capacity."""
        most = self.capacity + max(self.prefixes, default=0) if self.layout.read_whole else 0
        return self.layout.measure(places, max(room, most))

    def _set_rows(self, lengths: tuple[int, ...], encoded: tuple[int, ...]) -> None:
        """Set the first places as the rows."""
        rows = len(lengths)
        self.buffers = {name: memory[:rows] for name, memory in self._memory.items()}
        self.lengths, self._encoded_rows, self._is_bound = lengths, encoded, False

    def binding(
        self,
        graph: object,
        slots: object,
        new_binding: Callable[[], BindingT],
        bind: Callable[[BindingT, Mapping[str, Tensor], Mapping[str, Tensor]], object],
    ) -> BindingT:
        """Return a binding of the slots and the buffers; reuse it as long as graph and slots do not change.

        Args:
            graph: the object that runs the call.
            slots: an object that is the same for the same slots.
            new_binding: () -> a binding with the slots.
            bind: (binding, buffers, encoder outputs) -> None.
        """
        if self._binding is None or self._binding[0]() is not graph or self._binding[1]() is not slots:
            self._binding, self._is_bound = (weakref.ref(graph), weakref.ref(slots), new_binding()), False
        binding = self._binding[2]
        if not self._is_bound:
            bind(binding, self.buffers, self.encoder_outputs)
            self._is_bound = True
        return binding


def run_decode_step(
    cache: BufferedCache[BindingT], step: DecodeStep, run: Callable[[Mapping[str, Tensor], str, Tensor], object]
) -> Tensor:
    """Append tokens to a cache's rows (``BoundProgram.decode``).

    Args:
        cache: the cache with the rows so far.
        step: the new tokens.
        run: (inputs, name of the output with the logits, memory for the logits) -> None; runs the graph over the
            buffers.
    """
    layout, counts = cache.layout, tuple(step.counts)
    rows, length, wanted = len(counts), max(counts, default=0), step.wanted
    name, dtype = layout.logits
    if not length:
        return torch.zeros(*wanted.shape, layout.spec.vocabulary, dtype=dtype)
    logits = torch.empty(rows, wanted.shape[1] if layout.keeps_some else length, layout.spec.vocabulary, dtype=dtype)
    # A kernel may treat an empty row without new tokens as a row of one token.
    cache.reserve(max(int(0 in counts), *cache.filled) + length)
    cache.clear_unused(counts)
    ids = {layout.token_input: step.ids[:, :length], **({LOGITS_TO_KEEP: wanted} if layout.keeps_some else {})}
    inputs = cache.write_inputs(ids, {PAST_LENGTHS: cache.filled, NEW_LENGTHS: counts})
    try:
        run(inputs, name, logits)
    except BaseException:
        if not cache.is_croppable:  # a state may include tokens that the row does not have
            cache.clear(range(rows))
        raise
    cache.lengths = tuple(old + new for old, new in zip(cache.lengths, counts, strict=True))
    return logits if layout.keeps_some else logits[torch.arange(rows)[:, None], wanted]


def mask_name(token_input: str) -> str:
    """Return the name of the attention mask of a graph's tokens."""
    return f"decoder_{_MASK}" if token_input == DECODER_IDS else _MASK


def split_padding(arguments: Mapping[str, object], token_input: str = IDS) -> tuple[dict[str, object], list[int]]:
    """Return the arguments of a plain call without the mask, and the number of tokens of each row.

    Args:
        arguments: the arguments of the call, by name.
        token_input: the name of the ids.

    Raises:
        ChoiceError: the ids are missing or not numbers.
        InputMismatch: the mask marks anything except padding on the right.
    """
    mask_input, given = mask_name(token_input), dict(arguments)
    if given.get(token_input) is None:
        raise ChoiceError(
            f"a program that keeps a cache takes {token_input} and {mask_input} alone",
            next_step=f"give {token_input}=, and {mask_input}= where rows are padded; compiled with cache=False it "
            "takes all inputs",
        )
    ids = convert_input(token_input, given[token_input], None)
    padding = given.pop(mask_input, None)
    if ids.dim() != 2:
        raise InputMismatch(
            f"input '{token_input}' has shape {list(ids.shape)}; a program that keeps a cache takes [batch, length]",
            next_step="give a row of ids for each sequence",
        )
    if padding is None:
        return given, [ids.shape[1]] * ids.shape[0]
    mask = convert_input(mask_input, padding, None)
    counts = mask.bool().sum(-1) if mask.shape == ids.shape else None
    if counts is None or not torch.equal(mask.bool(), torch.arange(ids.shape[1]) < counts[:, None]):
        raise InputMismatch(
            f"the mask '{mask_input}' of shape {list(mask.shape)} hides more than the ends of rows",
            next_step="pad rows on the right; compiled with cache=False it takes any mask",
        )
    return given, counts.tolist()


def full_sequence_step(ids: Tensor, counts: Sequence[int]) -> DecodeStep:
    """Return the step that appends whole sequences to an empty cache, with the logits of every token."""
    last = torch.tensor(counts).clamp(min=1)[:, None] - 1
    return DecodeStep(ids=ids, counts=counts, wanted=torch.arange(ids.shape[1]).expand(ids.shape).minimum(last))
