"""Caches in ONNX Runtime: one buffer a layer that a session reads and writes, and calls that add to its rows.

Past and present are one memory, so that a call costs what its new tokens cost, however much room there is. A cache has
one IOBinding, in which the buffers and the slots stay bound from call to call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnxruntime as ort
import torch

from lorac.backends.onnx.model_files import MAX_LENGTH_KEY
from lorac.backends.onnxruntime.devices.memory import as_ort_value
from lorac.errors import ChoiceError, InputMismatch
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
    present_name,
)
from lorac.ir.graph.feeds import CacheInputShape
from lorac.target.kv_cache import CacheSpec, DecodeStep, KeyValueCache

Tensor = torch.Tensor
_DTYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}
_ENCODER_DTYPES = {**_DTYPES, "tensor(bool)": torch.bool, "tensor(int64)": torch.int64, "tensor(int32)": torch.int32}


@dataclass(frozen=True)
class CacheLayout:
    """What a graph's session has for a cache.

    Attributes:
        shapes: input of a layer's cache -> heads, size of each head, dtype.
        keeps: what the cache can hold.
        logits: the output that has them, and its dtype.
        picks: whether the graph picks the tokens whose logits are wanted; else it answers those of all.
        text: the input with the new tokens.
        memory: inputs that hold what an encoder made.
    """

    shapes: Mapping[str, tuple[int, int, torch.dtype]]
    keeps: CacheSpec
    logits: tuple[str, torch.dtype]
    picks: bool
    text: str
    memory: Mapping[str, CacheInputShape]

    @classmethod
    def of(cls, session: ort.InferenceSession, encodes: tuple[str, ...] = ()) -> CacheLayout | None:
        """A session's; None where it keeps no cache.

        Args:
            session: the graph's.
            encodes: inputs of its encoder, if it has one.
        """
        inputs = {found.name: found for found in session.get_inputs()}
        if PAST_LENGTHS not in inputs:
            return None
        longest = session.get_modelmeta().custom_metadata_map.get(MAX_LENGTH_KEY)
        logits = next(output for output in session.get_outputs() if not output.name.startswith(PRESENT_PREFIX))
        return cls(
            shapes={n: (i.shape[1], i.shape[3], _DTYPES[i.type]) for n, i in inputs.items() if is_past_input(n)},
            keeps=CacheSpec(
                limit=None if longest is None else int(longest), vocabulary=logits.shape[-1], encodes=encodes
            ),
            logits=(logits.name, _DTYPES[logits.type]),
            picks=LOGITS_TO_KEEP in inputs,
            text=find_token_input(inputs),
            memory={
                n: (_static_sizes(i.shape), _ENCODER_DTYPES[i.type]) for n, i in inputs.items() if is_encoder_output(n)
            },
        )

    def check_length(self, count: int) -> None:
        """Raise ``InputMismatch`` for a text of more tokens than there are positions for."""
        limit = self.keeps.limit
        if limit is not None and count > limit:
            raise InputMismatch(
                f"{count} tokens are more than the model has positions for: {limit}", next_step="give shorter texts"
            )


def _static_sizes(shape: Sequence[int | str | None]) -> tuple[int | None, ...]:
    return tuple(size if isinstance(size, int) else None for size in shape)


class OrtCache(KeyValueCache):
    """Keys and values as a session takes them.

    Args:
        layout: the graph's.
        rows: how many rows it begins with.
        capacity: the most tokens a row may have.
    """

    def __init__(self, layout: CacheLayout, rows: int, capacity: int) -> None:
        self.layout, self.capacity, self.lengths = layout, capacity, (0,) * rows
        self.buffers = {
            name: torch.zeros(rows, heads, capacity, size, dtype=dtype)
            for name, (heads, size, dtype) in layout.shapes.items()
        }
        self.memory: dict[str, Tensor] = {}
        self._owners = tuple(range(rows))
        self._bound: tuple[weakref.ref[Any], weakref.ref[Any], Any] | None = None

    @property
    def nbytes(self) -> int:  # type: ignore[override]  # told when it is asked for
        """As ``Cache`` says."""
        return sum(held.nbytes for held in (*self.buffers.values(), *self.memory.values()))

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        """Keep what an encoder made of each row, in the place of what was kept so far."""
        self.memory, self._owners, self._bound = dict(memory), tuple(range(len(self.lengths))), None

    def select(self, rows: Sequence[int]) -> None:
        """As ``Cache`` says."""
        if list(rows) == list(range(len(self.lengths))):
            return
        places = torch.tensor(list(rows), dtype=torch.int64)
        self._exchange({name: held.index_select(0, places) for name, held in self.buffers.items()})
        self.lengths = tuple(self.lengths[row] for row in rows)
        owners = tuple(self._owners[row] for row in rows)
        if owners != self._owners:  # beams of a row share what was encoded
            self.memory = {name: held.index_select(0, places) for name, held in self.memory.items()}
            self._owners = owners

    def crop(self, lengths: Sequence[int]) -> None:
        """As ``Cache`` says."""
        assert all(new <= old for new, old in zip(lengths, self.lengths, strict=True))
        self.lengths = tuple(lengths)

    def grow(self, capacity: int) -> None:
        """As ``Cache`` says."""
        self.capacity = max(capacity, self.capacity)
        self.admit(self.capacity)

    def copy(self) -> OrtCache:
        """As ``Cache`` says."""
        made = OrtCache(self.layout, 0, self.capacity)
        made.buffers = {name: held.clone() for name, held in self.buffers.items()}
        made.lengths, made.memory, made._owners = self.lengths, self.memory, self._owners  # it is never written
        return made

    def admit(self, room: int) -> None:
        """Make the buffers long enough for so many tokens, what pads a row among them."""
        held = next(iter(self.buffers.values()))
        if room > held.shape[2]:
            missing = room - held.shape[2]
            self._exchange({n: torch.nn.functional.pad(old, (0, 0, 0, missing)) for n, old in self.buffers.items()})

    def binding(self, session: ort.InferenceSession, values: Any, make: Callable[[], Any]) -> Any:
        """An IOBinding with the buffers bound as input and output, and what ``make`` has bound already.

        Args:
            session: what runs.
            values: what is in the slots; another content is bound anew.
            make: () -> an IOBinding with the slots bound.
        """
        if self._bound is None or self._bound[0]() is not session or self._bound[1]() is not values:
            io = make()
            for past, buffer in self.buffers.items():
                value = as_ort_value(buffer)
                io.bind_ortvalue_input(past, value)
                io.bind_ortvalue_output(present_name(past), value)
            for name, tensor in self.memory.items():
                io.bind_ortvalue_input(name, as_ort_value(tensor))
            self._bound = weakref.ref(session), weakref.ref(values), io
        return self._bound[2]

    def _exchange(self, buffers: dict[str, Tensor]) -> None:
        self.buffers, self._bound = buffers, None


def run_decode_step(
    session: ort.InferenceSession, values: Any, cache: OrtCache, extension: DecodeStep, make: Callable[[], Any]
) -> Tensor:
    """Add tokens to a cache's rows; as ``BoundProgram.decode``.

    Args:
        session: the graph's.
        values: what is in its slots.
        cache: the rows so far.
        extension: what is added.
        make: () -> an IOBinding of the session with the slots bound.
    """
    layout, counts = cache.layout, tuple(extension.counts)
    rows, length, wanted = len(counts), max(counts, default=0), extension.wanted
    name, dtype = layout.logits
    if not length:
        return torch.zeros(*wanted.shape, layout.keeps.vocabulary, dtype=dtype)
    logits = torch.empty(rows, wanted.shape[1] if layout.picks else length, layout.keeps.vocabulary, dtype=dtype)
    # The kernel takes a row that holds and brings nothing for one that holds a token.
    cache.admit(max(int(0 in counts), *cache.lengths) + length)
    given = {
        layout.text: extension.ids[:, :length].to(torch.int64).contiguous(),
        PAST_LENGTHS: torch.tensor(cache.lengths, dtype=torch.int32),
        NEW_LENGTHS: torch.tensor(counts, dtype=torch.int32),
    }
    if layout.picks:
        given[LOGITS_TO_KEEP] = wanted.to(torch.int64).contiguous()
    io = cache.binding(session, values, make)
    for what, tensor in given.items():
        io.bind_ortvalue_input(what, as_ort_value(tensor))
    io.bind_ortvalue_output(name, as_ort_value(logits))
    session.run_with_iobinding(io)
    cache.lengths = tuple(old + new for old, new in zip(cache.lengths, counts, strict=True))
    return logits if layout.picks else logits[torch.arange(rows)[:, None], wanted]


def split_padding(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], text: str = IDS
) -> tuple[dict[str, Any], list[int]]:
    """A plain call's arguments without the text's mask, and how many tokens each row has by it.

    Args:
        args, kwargs: of the call.
        text: what the ids are called.

    Raises:
        ChoiceError: more positional arguments than ids and a mask, or no ids.
        InputMismatch: a mask that does not pad rows on the right.
    """
    padding = f"decoder_{_MASK}" if text == DECODER_IDS else _MASK
    given = {**dict(zip((text, padding), args, strict=False)), **kwargs}
    if len(args) > 2 or given.get(text) is None:
        raise ChoiceError(
            f"a program that keeps a cache is called with {text} and {padding}",
            next_step=f"give {text}=, and {padding}= where rows are padded; cache=False takes what the model takes",
        )
    ids = torch.as_tensor(given[text])
    mask = given.pop(padding, None)
    if ids.dim() != 2:
        raise InputMismatch(
            f"input '{text}' has shape {list(ids.shape)}; a program that keeps a cache takes [batch, length]",
            next_step="give a row of ids for each text",
        )
    if mask is None:
        return given, [ids.shape[1]] * ids.shape[0]
    mask = torch.as_tensor(mask)
    counts = mask.bool().sum(-1) if mask.shape == ids.shape else None
    if counts is None or not torch.equal(mask.bool(), torch.arange(ids.shape[1]) < counts[:, None]):
        raise InputMismatch(
            f"input '{padding}' of shape {list(mask.shape)} hides more than the ends of rows",
            next_step="pad rows on the right; compiled with cache=False it takes any mask",
        )
    return given, counts.tolist()


def check_encoder_rows(memory: Mapping[str, Tensor], rows: int) -> None:
    """Raise ``InputMismatch`` where an encoder got another number of rows than the text has."""
    found = next(iter(memory.values())).shape[0]
    if found != rows:
        raise InputMismatch(
            f"the encoder's inputs have {found} rows, and the text has {rows}", next_step="give one of each per row"
        )


def full_sequence_step(ids: Tensor, counts: Sequence[int]) -> DecodeStep:
    """What adds whole texts to an empty cache, with the logits of every token."""
    last = torch.tensor(counts).clamp(min=1)[:, None] - 1
    return DecodeStep(ids=ids, counts=counts, wanted=torch.arange(ids.shape[1]).expand(ids.shape).minimum(last))


_MASK = "attention_mask"
