"""The adapters of a running batch: one place per row, written when the row's request is admitted.

A step reads the places without a copy, so that it costs the same for any mixture of adapters and any number of
registered adapters.
"""

import weakref
from collections.abc import Mapping

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
"""A choice's tensors (slots, …) for slots contiguous in memory, and their places (slots, rows, …), at least as large:
one copy writes all of them, padded with zeros."""


class RowBank:
    """The places for the adapters of each row of a batch. Only one thread may use a bank at a time.

    Args:
        engine: runs the program.
        base: the state without adapters, which every row has at first.
        rows: the most rows.
        graph: the graph that runs the rows.
        budget: the memory budget that the places are charged to.

    Raises:
        OverBudget: the memory budget has no room for the places.
    """

    def __init__(self, engine: Engine, base: ChoiceState, rows: int, graph: str, budget: MemoryBudget) -> None:
        self._engine, self._graph, self._budget, self._base = engine, graph, budget, base
        tensors = self._program(base).placed_tensors()
        self._places = _RowPlaces({name: (rows, *tensor.shape[1:]) for name, tensor in tensors.items()}, tensors)
        self._charge = budget.charge(self._places.stacks)
        for name, place in self._places.by_slot.items():
            place.copy_(tensors[name].expand_as(place))
        self._bound: dict[int, BoundProgram] = {}
        self._held: list[weakref.ref[ComposedWeights] | None] = [None] * rows
        self._apart: weakref.WeakKeyDictionary[ComposedWeights, str | None] = weakref.WeakKeyDictionary()
        self._copies: weakref.WeakKeyDictionary[ComposedWeights, list[_PlaceCopy]] = weakref.WeakKeyDictionary()

    @property
    def nbytes(self) -> int:
        """The size of the places in bytes."""
        return sum(size for _, size in self._charge.blocks)

    def admit(self, row: int, state: ChoiceState) -> None:
        """Overwrite the place of a row with a choice, unless it has that choice already.

        Raises:
            Unavailable: the choice fills slots that all rows share.
            OverBudget: the choice needs larger places, and the memory budget has no room; nothing is changed.
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
        """Return why a row with this choice cannot share a call with rows of other choices; None where it can."""
        if state.snapshot not in self._apart:
            self._apart[state.snapshot] = self._engine.why_apart(state.snapshot, self._graph)
        return self._apart[state.snapshot]

    def bound(self, rows: int) -> BoundProgram:
        """Return the engine's program bound to the first ``rows`` places."""
        if rows not in self._bound:
            places = {name: place[:rows] for name, place in self._places.by_slot.items()}
            self._bound[rows] = self._program(self._base).with_places(places)
        return self._bound[rows]

    def _program(self, state: ChoiceState) -> BoundProgram:
        assert state.bound is not None
        return state.bound

    def _widen(self, tensors: Mapping[str, Tensor]) -> None:
        """Grow the places to fit tensors; the content is copied, and the rest is zero."""
        before = self._places.by_slot
        if all(tensors[name].shape[1:] == place.shape[1:] for name, place in before.items()):
            return
        wider = {
            name: (len(place), *map(max, place.shape[1:], tensors[name].shape[1:])) for name, place in before.items()
        }
        if all(wider[name] == place.shape for name, place in before.items()):
            return
        places = _RowPlaces(wider, before)
        self._charge = self._budget.charge(places.stacks)
        for name, place in places.by_slot.items():
            write_place(place, before[name][None])
        self._places, self._bound = places, {}
        self._copies.clear()


class _RowPlaces:
    """The places of rows, uninitialised; places of slots with one shape and dtype are stacked.

    Args:
        shapes: slot -> the shape of its places (rows, …).
        tensors: slot -> a tensor of its dtype.

    Attributes:
        stacks: (slots, rows, …), one for each shape and dtype.
        by_slot: slot -> the places of all rows (rows, …).
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
        groups: dict[tuple[tuple[int, ...], torch.dtype], list[str]] = {}
        for name, shape in shapes.items():
            groups.setdefault((shape, tensors[name].dtype), []).append(name)
        self._names = list(groups.values())
        self.stacks = tuple(StackShape(len(names), shape, dtype).new() for (shape, dtype), names in groups.items())
        self.by_slot = {
            name: place
            for stack, names in zip(self.stacks, self._names, strict=True)
            for name, place in zip(names, stack.unbind(), strict=True)
        }

    def find_copies(self, tensors: Mapping[str, Tensor]) -> list[_PlaceCopy]:
        """Return the fewest copies that write a choice's tensors (1, …), by slot, into the places of a row."""
        copies = list[_PlaceCopy]()
        for stack, names in zip(self.stacks, self._names, strict=True):
            sources = find_stacks([tensors[name] for name in names])
            parts = stack.split([len(source) for source in sources])
            copies += zip([source[:, 0] for source in sources], parts, strict=True)
        return copies
