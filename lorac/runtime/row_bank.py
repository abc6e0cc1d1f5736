"""The adapters of a running batch: one place for each row, written when its request is admitted.

A step reads the places where they lie, so that it costs the same whatever the rows' adapters are, and however many are
registered.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

from torch import Tensor

from lorac.errors import Unavailable
from lorac.ir.slots.composition import ComposedWeights
from lorac.ir.slots.rows import write_place
from lorac.runtime.choice_states import ChoiceState
from lorac.target.engine import BoundProgram, Engine
from lorac.target.memory_budget import MemoryBudget


class RowBank:
    """A choice of adapters for each row of a batch. Only one thread may use it at a time.

    Args:
        engine: runs the program.
        base: the choice of no adapters, which every row has at first.
        rows: the most rows.
        graph: which graph the rows are of.
        budget: counts the places.

    Raises:
        OverBudget: there is no room for the places.
    """

    def __init__(self, engine: Engine, base: ChoiceState, rows: int, graph: str, budget: MemoryBudget) -> None:
        self._engine, self._graph, self._budget, self._base = engine, graph, budget, base
        self._places = {
            name: tensor.expand(rows, *tensor.shape[1:]).contiguous() for name, tensor in self._tensors(base).items()
        }
        self._charge = budget.charge(self._places.values())
        self._rows = _split_rows(self._places)
        self._bound: dict[int, BoundProgram] = {}
        self._apart: weakref.WeakKeyDictionary[ComposedWeights, str | None] = weakref.WeakKeyDictionary()

    def admit(self, row: int, state: ChoiceState) -> None:
        """Write a choice into the place of a row; what was there before leaves no trace.

        Raises:
            Unavailable: the choice fills slots that rows share.
            OverBudget: its rank is larger than any before, and there is no room for that; then nothing changes.
        """
        if state.snapshot not in self._apart:
            self._apart[state.snapshot] = self._engine.why_apart(state.snapshot, self._graph)
        why = self._apart[state.snapshot]
        if why is not None:
            raise Unavailable(
                f"the row cannot have adapters of its own: {why}",
                next_step="call with this choice for all rows, as adapters= takes it",
            )
        tensors = self._tensors(state)
        if any(tensor.shape != self._rows[row][name].shape for name, tensor in tensors.items()):
            self._widen(tensors)
        places = self._rows[row]
        for name, tensor in tensors.items():
            if tensor.shape == places[name].shape:
                places[name].copy_(tensor)
            else:
                write_place(places[name][0], tensor)

    def move(self, order: Sequence[int]) -> None:
        """Follow the rows of a cache (``KeyValueCache.remove``): each place gets what the row had that is there now."""
        for place in self._places.values():
            moved = {new: old for new, old in enumerate(order) if new != old}
            place[list(moved)] = place[list(moved.values())]

    def bound(self, rows: int) -> BoundProgram:
        """Return the engine's program for the first rows, each with its own choice."""
        if rows not in self._bound:
            first = {name: place[:rows] for name, place in self._places.items()}
            self._bound[rows] = self._engine.bind_places(self._content(self._base), first)  # type: ignore[arg-type]  # its own
        return self._bound[rows]

    def _content(self, state: ChoiceState) -> object:
        assert state.bound is not None
        return state.bound.content

    def _tensors(self, state: ChoiceState) -> dict[str, Tensor]:
        """Return a choice's tensors in slots with places, as the only place."""
        return self._engine.placed_tensors(self._content(state))  # type: ignore[arg-type]  # the engine's own

    def _widen(self, tensors: dict[str, Tensor]) -> None:
        """Make places large enough for tensors; what they hold stays, and the rest is zero."""
        wider = dict[str, Tensor]()
        for name, tensor in tensors.items():
            place = self._places[name]
            sizes = [max(pair) for pair in zip(place.shape[1:], tensor.shape[1:], strict=True)]
            if sizes != list(place.shape[1:]):
                wider[name] = place.new_zeros(place.shape[0], *sizes)
                wider[name][tuple(slice(size) for size in place.shape)] = place
        if wider:
            places = {**self._places, **wider}
            self._charge = self._budget.charge(places.values())
            self._places, self._rows, self._bound = places, _split_rows(places), {}


def _split_rows(places: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return the place of each row (1, …), by slot, over the same memory."""
    rows = len(next(iter(places.values()), ()))
    return [{name: place[row : row + 1] for name, place in places.items()} for row in range(rows)]
