"""The adapters of a running batch: one place for each row, written when its request is admitted.

A step reads the places where they lie, so that it costs the same whatever the rows' adapters are, and however many are
registered.
"""

import functools
import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorac.errors import Unavailable
from lorac.ir.slots.composition import ComposedWeights
from lorac.ir.slots.places import write_place
from lorac.ir.slots.stacks import StackShape, find_stacks
from lorac.runtime.choice_states import ChoiceState
from lorac.target.engine import BoundProgram, Engine
from lorac.target.memory_budget import MemoryBudget

_PlaceCopy = tuple[Tensor, Tensor]
"""A choice's tensors (slots, …) of slots that lie one behind the other, and their places (slots, rows, …), which are at
least as large: one copy writes all of them, and zeros where the tensors do not fill the places."""


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
        tensors = self._program(base).placed_tensors()
        self._places = _RowPlaces.of({name: (rows, *tensor.shape[1:]) for name, tensor in tensors.items()}, tensors)
        self._charge = budget.charge(self._places.stacks)
        for name, place in self._places.by_slot.items():
            place.copy_(tensors[name].expand_as(place))
        self._bound: dict[int, BoundProgram] = {}
        self._held: list[weakref.ref[ComposedWeights] | None] = [None] * rows
        self._apart: weakref.WeakKeyDictionary[ComposedWeights, str | None] = weakref.WeakKeyDictionary()
        self._copies: weakref.WeakKeyDictionary[ComposedWeights, list[_PlaceCopy]] = weakref.WeakKeyDictionary()

    @property
    def nbytes(self) -> int:
        """The size of the places."""
        return sum(size for _, size in self._charge.blocks)

    def admit(self, row: int, state: ChoiceState) -> None:
        """Write a choice into the place of a row, unless it is there; the earlier content leaves no trace.

        Raises:
            Unavailable: the choice fills slots that rows share.
            OverBudget: its rank is larger than any before, and there is no room for that; then nothing changes.
        """
        held = self._held[row]
        if held is not None and held() is state.snapshot:
            return
        why = self.why_apart(state)
        if why is not None:
            raise Unavailable(
                f"the row cannot have adapters of its own: {why}",
                next_step="call with this choice for all rows, as adapters= takes it",
            )
        if state.snapshot not in self._copies:
            tensors = self._program(state).placed_tensors()
            self._widen(tensors)
            self._copies[state.snapshot] = self._places.find_copies(tensors)
        for source, places in self._copies[state.snapshot]:
            write_place(places[:, row], source[None])
        self._held[row] = weakref.ref(state.snapshot)

    def why_apart(self, state: ChoiceState) -> str | None:
        """Return why a row with a choice cannot share a call with rows of other choices; None where it can."""
        if state.snapshot not in self._apart:
            self._apart[state.snapshot] = self._engine.why_apart(state.snapshot, self._graph)
        return self._apart[state.snapshot]

    def bound(self, rows: int) -> BoundProgram:
        """Return the engine's program for the rows in the first places."""
        if rows not in self._bound:
            places = {name: place[:rows] for name, place in self._places.by_slot.items()}
            self._bound[rows] = self._program(self._base).with_places(places)
        return self._bound[rows]

    def _program(self, state: ChoiceState) -> BoundProgram:
        assert state.bound is not None
        return state.bound

    def _widen(self, tensors: Mapping[str, Tensor]) -> None:
        """Make places large enough for tensors; their content stays, and the rest is zero."""
        before = self._places.by_slot
        wider = {
            name: (len(place), *map(max, place.shape[1:], tensors[name].shape[1:])) for name, place in before.items()
        }
        if all(wider[name] == place.shape for name, place in before.items()):
            return
        places = _RowPlaces.of(wider, before)
        self._charge = self._budget.charge(places.stacks)
        for name, place in places.by_slot.items():
            write_place(place, before[name][None])
        self._places, self._bound = places, {}
        self._copies.clear()


@dataclass(frozen=True, eq=False)
class _RowPlaces:
    """The places of rows; those of slots of one shape lie one behind the other.

    Attributes:
        stacks: (slots, rows, …), one for each shape and dtype.
        names: the slots of each stack, in its order.
    """

    stacks: tuple[Tensor, ...]
    names: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> "_RowPlaces":
        """Return uninitialised places of shapes (rows, …), by slot, for tensors of these dtypes."""
        groups: dict[tuple[tuple[int, ...], torch.dtype], list[str]] = {}
        for name, shape in shapes.items():
            groups.setdefault((shape, tensors[name].dtype), []).append(name)
        stacks = [StackShape(len(names), shape, dtype).new() for (shape, dtype), names in groups.items()]
        return cls(tuple(stacks), tuple(map(tuple, groups.values())))

    @functools.cached_property
    def by_slot(self) -> Mapping[str, Tensor]:
        """Slot -> the places of all rows (rows, …)."""
        return {
            name: place
            for stack, names in zip(self.stacks, self.names, strict=True)
            for name, place in zip(names, stack.unbind(), strict=True)
        }

    def find_copies(self, tensors: Mapping[str, Tensor]) -> list[_PlaceCopy]:
        """Return as few copies as write a choice's tensors (1, …), by slot, into the places of rows."""
        copies = list[_PlaceCopy]()
        for stack, names in zip(self.stacks, self.names, strict=True):
            sources = find_stacks([tensors[name][0] for name in names])
            parts = stack.split([len(source) for source in sources])
            copies += zip(sources, parts, strict=True)
        return copies
