"""The state of an engine for each choice of adapters, made when it is needed and kept while there is room."""

import contextlib
import functools
import itertools
import operator
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lorac.adapters.pool import AdapterPool, PoolEntry, TensorVersions
from lorac.errors import FormatError, NeedsRecompile
from lorac.ir.sites.site import BaseReader
from lorac.ir.slots.choice import Active, Choice, describe_choice
from lorac.ir.slots.composition import ComposedWeights, compose_choice, fill_slots
from lorac.ir.slots.plans import PreparedAdapter, SitePlan, SiteSlots
from lorac.runtime.capacity import suggest_reserve
from lorac.runtime.slot_images import SlotImage, SlotImages
from lorac.storage.atomic_folders import replace_atomically
from lorac.storage.paths import parse_path, translate_os_errors
from lorac.target.engine import BoundProgram, Engine
from lorac.target.memory_budget import Charge

_AS_TRAINED = Active()
_MAX_MIXTURES = 8
"""Kept states of mixtures and strengths, whatever the room."""
_MAX_TOGETHER = 4
"""Kept bindings of several choices in one call, whatever the room."""


@dataclass(frozen=True, eq=False)
class ChoiceState:
    """A choice of adapters as calls use it.

    It is replaced whole, so that a call never sees a half-changed one. It holds its adapters, so that a call can end
    with an adapter that was removed meanwhile.

    Attributes:
        snapshot: the choice, composed at every site.
        bound: the engine's binding; None if the engine writes weights instead.
        pool: reads the versions of tensors.
        entries: the adapters of the choice.
        versions: the versions of their tensors from which the state was made.
        nbytes: size of its slots in bytes.
        charge: the memory of its tensors.
        lease: an object that lives as long as somebody uses the state; None in the state that is kept.
    """

    snapshot: ComposedWeights
    bound: BoundProgram | None
    pool: AdapterPool
    entries: tuple[PoolEntry, ...]
    versions: TensorVersions
    nbytes: int
    charge: Charge
    lease: "_Lease | None" = None

    @property
    def choice(self) -> Choice:
        """The choice."""
        return self.snapshot.choice

    @property
    def stale(self) -> bool:
        """Whether a tensor of its adapters was written or exchanged since the state was made."""
        return not self.versions.agrees(self.pool.read_versions(self.entries, self.versions))


class _Lease:
    """Lives as long as a state is in use."""

    __slots__ = ("__weakref__",)


class _KeptState:
    """A state that is kept, and what was handed out of it.

    Args:
        state: the state, without a lease.
    """

    def __init__(self, state: ChoiceState) -> None:
        self.state, self._lock = state, threading.Lock()
        self._lease: Callable[[], _Lease | None] = lambda: None
        self._handed: Callable[[], ChoiceState | None] = lambda: None

    def hand_out(self) -> ChoiceState:
        """Return the state for use, the same object as long as somebody holds that."""
        with self._lock:
            handed = self._handed()
            if handed is None:
                lease = self._lease() or _Lease()
                handed = replace(self.state, lease=lease)
                self._lease, self._handed = weakref.ref(lease), weakref.ref(handed)
            return handed

    def is_in_use(self) -> bool:
        """Return whether somebody holds the state."""
        return self._lease() is not None


@dataclass(frozen=True, eq=False)
class _RowsBinding:
    """A binding of several choices in one call.

    Attributes:
        choices: the choice of each place.
        charges: the memory of their states, as long as these are kept or in use.
        bound: the binding, which holds its own memory's charge.
    """

    choices: tuple[Choice, ...]
    charges: tuple[weakref.ref[Charge], ...]
    bound: BoundProgram

    def is_of(self, states: Sequence[ChoiceState]) -> bool:
        """Return whether it was made of these states."""
        return len(self.charges) == len(states) and all(
            charge() is state.charge for charge, state in zip(self.charges, states, strict=True)
        )


class ChoiceStates:
    """The states of a compiled model.

    Args:
        engine: binds the slots.
        plans: the slots of every site.
        base: reads base weights.
        lock: held while a state is made and while the pool changes.
    """

    def __init__(
        self, engine: Engine, plans: Mapping[str, SitePlan], pool: AdapterPool, base: BaseReader, lock: threading.RLock
    ) -> None:
        self._engine, self._plans, self._pool, self._base = engine, plans, pool, base
        self._lock = lock
        self._kept: dict[Choice, _KeptState] = {}
        self._idle: dict[str, SiteSlots] = {}
        self._together: dict[int, _RowsBinding] = {}
        self._numbers = itertools.count()
        self._images = SlotImages()
        self._base_program: BoundProgram | None = None

    def of(self, choice: Choice, *, stale: bool = False) -> ChoiceState:
        """Return the state of a choice.

        Args:
            stale: accept a state that was made before its adapters were trained.

        Raises:
            AdapterNotFound: an adapter of the choice was removed.
            NeedsRecompile: its adapters do not fit together.
            OverBudget: there is no room for it.
        """
        state = self._find(choice, stale=stale) or self._bring_back(choice)
        while state is None:
            state = self._prepare(choice, stale=stale)
        return state

    def _prepare(self, choice: Choice, *, stale: bool) -> ChoiceState | None:
        """Return the state of a choice, or None where one of its adapters was exchanged while it was read."""
        if self._base_program is None and self._find_stored(choice) is not None:
            self.of(())  # which an image of the adapter's slots leaves out
        # Adapters are read and prepared without the lock, which other calls need.
        entries = self._pool.select([name for name, _ in choice])
        prepared = {name: self._pool[name] for name, _ in choice}
        with self._lock:
            state = self._find(choice, stale=stale)
            if state is None and self._pool.select([*prepared]) == entries:
                state = self._keep(self.new(choice, prepared))
        return state

    def _may_be_apart(self, state: ChoiceState) -> bool:
        """Return whether all slots that a choice fills have places."""
        graphs = self._engine.interfaces
        return bool(graphs) and not any(self._engine.why_apart(state.snapshot, graph) for graph in graphs)

    def _find(self, choice: Choice, *, stale: bool) -> ChoiceState | None:
        """Return the state of a choice if it is kept."""
        kept = self._kept.get(choice)
        if kept is None or not (stale or not kept.state.stale):
            return None
        self._pool.budget.touch((id(self), choice))
        return kept.hand_out()

    def _keep(self, state: ChoiceState) -> ChoiceState:
        """Keep a state while there is room, and return it for use."""
        choice, kept = state.choice, _KeptState(state)
        take = functools.partial(operator.setitem, self._kept, choice, kept)
        drop = functools.partial(self._let_go, choice)
        self._pool.budget.keep((id(self), choice), state.charge, take, drop, kept.is_in_use)
        self._base_program = self._base_program if choice else state.bound
        mixtures = [known for known in tuple(self._kept) if len(known) > 1 or (known and known[0][1] != _AS_TRAINED)]
        for oldest in mixtures[:-_MAX_MIXTURES]:
            self._drop(oldest)
        return kept.hand_out()

    def _let_go(self, choice: Choice) -> None:
        """Evict a state; cache the contents of the slots of an adapter on disk first."""
        kept, entry = self._kept.pop(choice, None), self._find_stored(choice)
        if kept is None or entry is None or self._base_program is None or kept.state.entries != (entry,):
            return
        name, state = choice[0][0], kept.state
        if self._images.find(name, entry) is not None or not self._may_be_apart(state):
            return
        base = self._base_program.placed_tensors()
        assert state.bound is not None
        own = {n: t for n, t in state.bound.placed_tensors().items() if not _is_same(t, base[n])}
        self._images.write(name, entry, state.snapshot, own)

    def _bring_back(self, choice: Choice) -> ChoiceState | None:
        """Return the state of an adapter on disk, if the contents of its slots were cached."""
        if self._find_stored(choice) is None:
            return None
        with self._lock:
            state, entry = self._find(choice, stale=False), self._pool.find(choice[0][0])
            image = self._images.find(choice[0][0], entry) if state is None else None
            if image is None:
                return state
            begun, base = time.monotonic(), self.of(()).bound
            read = None if base is None else self._read_slots(image)
            if base is None or read is None:
                return None
            self._pool.read_seconds.append(time.monotonic() - begun)
            slots, charge = read
            layout, versions = image.layout, self._pool.read_versions((entry,))
            bound = base.with_places(layout.view(slots))
            snapshot = ComposedWeights(choice, layout.sites)
            return self._keep(ChoiceState(snapshot, bound, self._pool, (entry,), versions, layout.nbytes, charge))

    def _read_slots(self, image: SlotImage) -> tuple[Tensor, Charge] | None:
        """Return the contents of slots and their memory's charge, if they can be read.

        Room is made first: reading into memory that was just let go of is faster than into new memory.
        """
        charge = self._pool.budget.claim(image.layout.nbytes)
        try:
            memory = torch.empty(image.layout.nbytes, dtype=torch.uint8)
            charge.cover([memory])
            return (memory, charge) if self._images.read(image, memory) else None
        except BaseException:
            charge.resize(0)  # the error's traceback holds it
            raise

    def _find_stored(self, choice: Choice) -> PoolEntry | None:
        """Return the entry of a choice that is one adapter on disk as it is, else None."""
        alone = len(choice) == 1 and choice[0][1] == _AS_TRAINED
        entry = self._pool.entries.get(choice[0][0]) if alone else None
        return entry if entry is not None and entry.adapter is None else None

    def _drop(self, choice: Choice) -> None:
        self._kept.pop(choice, None)
        self._pool.budget.forget((id(self), choice))

    def bind_rows(self, states: Sequence[ChoiceState]) -> BoundProgram:
        """Return the engine's binding of states that may share a call, one for each part of its rows.

        Raises:
            OverBudget: there is no room for it.
        """
        budget, programs = self._pool.budget, [state.bound for state in states if state.bound is not None]
        if self._engine.computes_terms:
            return self._engine.bind_rows(programs)
        with self._lock:
            number = next((n for n, known in tuple(self._together.items()) if known.is_of(states)), None)
            known = None if number is None else self._together.get(number)
            if known is not None:
                budget.touch((id(self), number))
                return known.bound
            made = self._engine.bind_rows(programs)
            charge = budget.charge(made.own)
            number, bound = next(self._numbers), replace(made, charge=charge)
            charges = tuple(weakref.ref(state.charge) for state in states)
            binding = _RowsBinding(tuple(state.choice for state in states), charges, bound)
            take = functools.partial(operator.setitem, self._together, number, binding)
            budget.keep((id(self), number), charge, take, functools.partial(self._together.pop, number, None))
            for oldest in tuple(self._together)[:-_MAX_TOGETHER]:
                self._together.pop(oldest, None)
            return bound

    def new(self, choice: Choice, prepared: Mapping[str, PreparedAdapter] | None = None) -> ChoiceState:
        """Make the state of a choice, without looking for one that is kept, or keeping it.

        Args:
            prepared: the adapters of the choice; default: the pool's.
        """
        with self._lock:
            entries = self._pool.select([name for name, _ in choice])
            versions = self._pool.read_versions(entries)
            snapshot = compose_choice(self._plans, self._pool if prepared is None else prepared, choice, self._base)
            bound, slots = self._bind(choice, snapshot)
            filled = [tensor for path in snapshot.composed if slots for tensor in slots[path].named().values()]
            charge = self._pool.budget.charge((*snapshot.tensors(), *filled))
            nbytes = sum(tensor.nbytes for tensor in filled)
            return ChoiceState(snapshot, bound, self._pool, entries, versions, nbytes, charge)

    def _bind(self, choice: Choice, snapshot: ComposedWeights) -> tuple[BoundProgram | None, Mapping[str, SiteSlots]]:
        """Return the engine's binding of a choice, unless the engine writes weights, and the slots that were filled."""
        if self._engine.fused:
            return None, {}
        if self._engine.constant:
            return self._engine.bind(snapshot, {}), {}
        with self._suggesting_reserve(choice):
            slots = fill_slots(self._plans, snapshot, self._base, self._idle)
        return self._engine.bind(snapshot, slots), slots

    def save(self, choice: Choice, graph: str, path: str | Path) -> None:
        """Write a choice as a file of the engine's own kind, in one step. No state is made of the choice."""
        target = parse_path(path, "where save_choice writes to", FormatError, "unreadable")
        snapshot = compose_choice(self._plans, self._pool, choice, self._base)
        writing = translate_os_errors(target, FormatError, "written", code="unreadable")
        with writing, replace_atomically(target) as staged, self._suggesting_reserve(choice):
            self._engine.write_choice(snapshot, graph, staged)

    @contextlib.contextmanager
    def _suggesting_reserve(self, choice: Choice) -> Iterator[None]:
        """Name in a ``NeedsRecompile`` of the block the ``reserve=`` that admits the choice."""
        try:
            yield
        except NeedsRecompile as error:
            reserve = suggest_reserve([self._pool[name] for name, _ in choice])
            raise NeedsRecompile(
                f"{describe_choice(choice)} does not fit together: {error.what}",
                next_step=f"compile again with {reserve}",
            ) from error

    def forget(self, name: str) -> None:
        """Keep no state that an adapter is part of; those in use last until nobody uses them."""
        self._images.forget(name)
        for choice in [choice for choice in tuple(self._kept) if name in dict(choice)]:
            self._drop(choice)
        for number, known in tuple(self._together.items()):
            if any(name in dict(choice) for choice in known.choices):
                self._together.pop(number, None)

    def clear(self) -> None:
        """Drop all states, because the model's own tensors were exchanged."""
        self._idle, self._base_program = {}, None
        self._images.clear()
        self._together.clear()
        for choice in tuple(self._kept):
            self._drop(choice)


def _is_same(tensor: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are one part of memory."""
    return tensor.data_ptr() == other.data_ptr() and tensor.shape == other.shape
