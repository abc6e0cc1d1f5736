"""A target whose cache holds tokens, and which computes every sequence again: slow and exact, an oracle for drivers.

It wraps a compiled model of target eager, and uses its choices of adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import lorac
from lorac.ir.calls.call import Call
from lorac.ir.slots.composition import ComposedWeights
from lorac.ir.slots.plans import SiteSlots
from lorac.target.engine import BoundProgram, CallResult, Engine
from lorac.target.kv_cache import CacheSpec, DecodeStep, KeyValueCache


class Tokens(KeyValueCache):
    """A cache that holds the tokens of its rows."""

    def __init__(self, rows: Sequence[Tensor], capacity: int) -> None:
        self.rows, self.capacity = list(rows), capacity

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(len(row) for row in self.rows)

    @property
    def nbytes(self) -> int:
        return 8 * self.capacity * len(self.rows)

    def select(self, rows: Sequence[int]) -> None:
        self.rows = [self.rows[row] for row in rows]

    def crop(self, lengths: Sequence[int]) -> None:
        assert all(length <= own for length, own in zip(lengths, self.lengths, strict=True))
        self.rows = [row[:length] for row, length in zip(self.rows, lengths, strict=True)]

    def join(self, other: KeyValueCache) -> None:
        assert isinstance(other, Tokens)
        self.rows, self.capacity = [*self.rows, *other.rows], max(self.capacity, other.capacity)

    def hold_prefix(self, keys_values: Tensor | None) -> None:
        raise NotImplementedError("it holds tokens, and prompts have tests on engines with keys and values")

    def grow(self, capacity: int = 0, rows: int = 0) -> None:
        self.capacity = max(self.capacity, capacity)

    def copy(self, rows: Sequence[int] | None = None) -> Tokens:
        return Tokens([self.rows[row] for row in (range(len(self.rows)) if rows is None else rows)], self.capacity)


class Recomputing(Engine):
    """Runs an eager engine's model on whole sequences.

    Args:
        inner: the engine.
        limit, vocabulary: the model's.

    Attributes:
        spec: the limits of its caches; None for an engine without caches.
        fed: (rows, tokens of each) of every call.
    """

    target = "recomputing"
    module = None

    def __init__(self, inner: Any, limit: int | None, vocabulary: int) -> None:
        self.inner, self.mode, self.buffers = inner, inner.mode, inner.buffers
        self.spec: CacheSpec | None = CacheSpec(limit=limit, vocabulary=vocabulary)
        self.fed: list[list[int]] = []

    @property
    def fused(self) -> bool:
        return self.inner.fused

    def cache_spec(self, graph: str) -> CacheSpec | None:
        return self.spec

    def new_cache(self, graph: str, rows: int, capacity: int) -> KeyValueCache:
        if self.spec is None:
            return Engine.new_cache(self, graph, rows, capacity)
        return Tokens([torch.empty(0, dtype=torch.long)] * rows, capacity)

    def bind(self, snapshot: ComposedWeights, slots: Mapping[str, SiteSlots]) -> RecomputingProgram:
        return RecomputingProgram(self, self.inner.bind(snapshot, slots))

    @property
    def written_program(self) -> RecomputingProgram:
        return RecomputingProgram(self, self.inner.written_program)

    def record_written(self, snapshot: ComposedWeights) -> None:
        self.inner.record_written(snapshot)


@dataclass(frozen=True, eq=False)
class RecomputingProgram(BoundProgram):
    """The program of the engine inside, which computes whole sequences."""

    engine: Recomputing
    inner: BoundProgram

    def activate(self) -> None:
        self.inner.activate()

    def run(self, graph: str, call: Call) -> CallResult:
        return self.inner.run(graph, call)

    def decode(self, graph: str, cache: KeyValueCache, step: DecodeStep) -> Tensor:
        assert isinstance(cache, Tokens)
        counts = list(step.counts)
        self.engine.fed.append(counts)
        new = [torch.cat([row, ids[:n]]) for row, ids, n in zip(cache.rows, step.ids, counts, strict=True)]
        assert max(map(len, new)) <= cache.capacity
        whole = torch.nn.utils.rnn.pad_sequence(
            [row if len(row) else row.new_zeros(1) for row in new], batch_first=True
        )
        with torch.no_grad():
            output: Any = self.inner.run(graph, Call(kwargs={"input_ids": whole, "use_cache": False})).output
        places = torch.tensor(cache.lengths)[:, None] + step.wanted
        logits = output.logits
        picked = logits.gather(1, places.clamp(max=whole.shape[1] - 1)[:, :, None].expand(-1, -1, logits.shape[2]))
        cache.rows = new
        # The logits of a row without new tokens may be anything, and must not be used.
        idle = torch.tensor(counts) == 0
        return picked.masked_fill(idle[:, None, None], float("nan"))


def over(compiled: Any, limit: int | None = None) -> lorac.Compiled:
    """Return a compiled model over the same engine and adapters that generates over such caches."""
    engine = Recomputing(compiled.engine, limit, compiled.host.config.vocab_size)
    made = lorac.Compiled(compiled.session, engine)
    if compiled.mode == "baked":
        made.switch.record_baked(compiled.choice)
    else:
        made.swap(dict(compiled.choice) or None)
    return made
