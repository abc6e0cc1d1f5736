"""Adapters that act from their invocation tokens on, in rows over a cache.

The tokens before an adapter's invocation tokens are computed without that adapter. So their keys and values equal
those of any row with the remaining adapters, or of the base model.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, final

import torch
from torch import Tensor

from lorac.errors import Unavailable
from lorac.ir.calls.call import Call
from lorac.ir.slots.invocation import find_start, no_prompt_error
from lorac.ir.slots.places import choose_places
from lorac.target.engine import BoundProgram, CallResult
from lorac.target.kv_cache import DecodeStep, KeyValueCache

if TYPE_CHECKING:
    from lorac.runtime.choice_states import ChoiceState, ChoiceStates


class Phase(NamedTuple):
    """The state that applies to a row's tokens from a place on."""

    start: int
    state: ChoiceState


def find_phases(states: ChoiceStates, state: ChoiceState, tokens: Tensor) -> list[Phase]:
    """Return the phases of a row in order; the first starts at token 0.

    Args:
        state: the state with all adapters of the row.
        tokens: the tokens of the row's prompt (length,).
    """
    starts = {name: find_start(tokens, invocation) for name, invocation in state.snapshot.invocations.items()}
    found = list[Phase]()
    for place in sorted({0, *(start for start in starts.values() if start is not None)}):
        off = {name for name, start in starts.items() if start is None or start > place}
        found.append(Phase(place, states.of(tuple(one for one in state.choice if one[0] not in off)) if off else state))
    return found


@final
@dataclass(frozen=True, eq=False)
class InvokedProgram(BoundProgram):
    """The program of rows with adapters that act from their invocation tokens on.

    Attributes:
        states: the cache of states; it also computes the state of a choice without some adapters.
        rows: the state of each row, or one state for all rows.
        phases: the phases of each row; empty until ``for_prompts``.
    """

    states: ChoiceStates
    rows: Sequence[ChoiceState]
    phases: Sequence[Sequence[Phase]] = ()

    def for_prompts(self, ids: Tensor, mask: Tensor | None) -> InvokedProgram:
        tokens = ids if mask is None else [row[own.bool()] for row, own in zip(ids, mask, strict=True)]
        rows = zip(itertools.cycle(self.rows), tokens, strict=False)
        found = [find_phases(self.states, state, row) for state, row in rows]
        return InvokedProgram(self.engine, self.states, self.rows, found, parts=self.parts)

    def run(self, graph: str, call: Call) -> CallResult:
        raise self._error()

    def encode(self, graph: str, cache: KeyValueCache, inputs: Mapping[str, object]) -> None:
        raise self._error()

    def _error(self) -> Unavailable:
        return no_prompt_error([name for state in self.rows for name in state.snapshot.invocations])

    @functools.cached_property
    def programs(self) -> list[tuple[list[float], BoundProgram]]:
        """The programs that run one after another, each with the place of each row at which it stops.

        The last program computes the last phase of every row, so that new tokens of all rows take one call.
        """
        assert self.phases
        most, found = max(map(len, self.phases)), list[tuple[list[float], BoundProgram]]()
        for index in range(most):
            own = [row[min(index, len(row) - 1)].state for row in self.phases]
            ends = [math.inf if index == most - 1 else row[min(index + 1, len(row) - 1)].start for row in self.phases]
            alone = all(state is own[0] for state in own)
            bound = own[0].bound if alone else self.states.bind_rows(choose_places(own))
            assert bound is not None
            found.append((ends, bound))
        return found

    def decode(self, graph: str, cache: KeyValueCache, step: DecodeStep) -> Tensor:
        """Add tokens to the rows, each token with its phase's adapters; a call that fails may have added tokens."""
        past, programs, logits = cache.lengths, self.programs, None
        done, copies = [0] * len(past), len(past) // len(self.phases)
        for ends, program in programs:
            places = [max(ends[row // copies] - before, 0) for row, before in enumerate(past)]
            upto = [max(int(min(n, end)), had) for n, end, had in zip(step.counts, places, done, strict=True)]
            if upto == done:
                continue
            first, last = torch.tensor(done)[:, None], torch.tensor(upto)[:, None]
            parts = [row[had:end] for row, had, end in zip(step.ids, done, upto, strict=True)]
            part = DecodeStep(
                ids=torch.nn.utils.rnn.pad_sequence(parts, batch_first=True),
                counts=[len(ids) for ids in parts],
                wanted=(step.wanted - first).clamp(min=0).minimum((last - first - 1).clamp(min=0)),
            )
            found, own = program.decode(graph, cache, part), (step.wanted >= first) & (step.wanted < last)
            logits, done = found if logits is None else torch.where(own[..., None], found, logits), upto
        assert logits is not None
        return logits
