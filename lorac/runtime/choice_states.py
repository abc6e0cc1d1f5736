"""The state of an engine for each choice of adapters, computed on first use and cached while memory allows."""

import contextlib
import functools
import operator
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lorac.adapters.pool import AdapterPool, PoolEntry, TensorVersions
from lorac.adapters.slot_moves import SlotMoves
from lorac.adapters.stored import AdapterStructure, SlotLayout, StoredAdapter
from lorac.errors import FormatError, NeedsRecompile, Unavailable
from lorac.ir.sites.site import BaseReader
from lorac.ir.slots.choice import AS_TRAINED, Choice, describe_choice
from lorac.ir.slots.composition import ComposedWeights, compose_choice, fill_slots
from lorac.ir.slots.invocation import no_prompt_error
from lorac.ir.slots.plans import PreparedAdapter, SitePlan, SiteSlots
from lorac.ir.slots.stacks import new_memory
from lorac.runtime.capacity import suggest_reserve
from lorac.runtime.slot_images import SlotImage, SlotImages
from lorac.storage.atomic_folders import replace_atomically
from lorac.storage.paths import parse_path, translate_os_errors
from lorac.target.engine import BoundProgram, Engine
from lorac.target.memory_budget import Charge

_MAX_MIXTURES = 8
"""The most cached states of mixtures and strengths, even where memory would allow more."""
_MAX_TOGETHER = 4
"""The most cached bindings of several choices in one call, even where memory would allow more."""
_MOST_NUMBERED = 1 << 26
"""The most values of an adapter to number; for a moment, their numbers take 20 bytes each."""


@dataclass(frozen=True, eq=False)
class ChoiceState:
    """A choice of adapters as calls use it.

    A state is never changed, only replaced, so that no call sees a half-changed state. It references its adapters, so
    that a running call can finish after one of them was removed.

    Attributes:
        snapshot: the choice, composed at every site.
        bound: the engine's program with the choice; None if the engine writes weights instead.
        entries: the adapters of the choice.
        versions: the versions of the adapters' tensors from which the state was computed.
        nbytes: size of the filled slots in bytes.
        charge: the memory of the state's tensors.
        original: the state that this one copies; the copy keeps it in use.
    """

    snapshot: ComposedWeights
    bound: BoundProgram | None
    entries: tuple[PoolEntry, ...]
    versions: TensorVersions
    nbytes: int
    charge: Charge
    original: "ChoiceState | None" = None

    @property
    def choice(self) -> Choice:
        """The choice."""
        return self.snapshot.choice


class ChoiceStates:
    """The cache of a compiled model's states, one per choice.

    Args:
        engine: binds the slots.
        plans: the slots of every site.
        base: reads base weights.
        lock: held while a state is computed and while the pool changes.
    """

    def __init__(
        self, engine: Engine, plans: Mapping[str, SitePlan], pool: AdapterPool, base: BaseReader, lock: threading.RLock
    ) -> None:
        self._engine, self._plans, self._pool, self._base = engine, plans, pool, base
        self._lock = lock
        self._kept: dict[Choice, ChoiceState] = {}
        self._in_use: dict[Choice, weakref.ref[ChoiceState]] = {}
        self._use_lock = threading.Lock()
        self._idle: dict[str, SiteSlots] = {}
        self._together: dict[tuple[Choice, ...], tuple[tuple[weakref.ref[Charge], ...], BoundProgram]] = {}
        self._images = SlotImages()
        self._evicted: dict[str, int] = {}
        self._reading = threading.RLock()
        self._seen: weakref.WeakSet[AdapterStructure] = weakref.WeakSet()
        self._moves: weakref.WeakKeyDictionary[AdapterStructure, SlotMoves | None] = weakref.WeakKeyDictionary()

    def of(self, choice: Choice, *, stale: bool = False) -> ChoiceState:
        """Return the state of a choice.

        Args:
            stale: accept a state that was computed before its adapters were trained.

        Raises:
            AdapterNotFound: an adapter of the choice was removed.
            NeedsRecompile: the adapters of the choice do not fit together.
            OverBudget: the memory budget has no room for the state.
        """
        state = self._find(choice, stale=stale) or self._bring_back(choice)
        while state is None:
            state = self._prepare(choice, stale=stale)
        return state

    def _prepare(self, choice: Choice, *, stale: bool) -> ChoiceState | None:
        """Compute and cache the state of a choice; return None where an adapter was replaced while it was read."""
        if () not in self._kept and self._find_stored(choice) is not None:
            self.of(())  # an image of an adapter's slots leaves out the tensors of the empty choice
        # Adapters are read and prepared without the lock, so that other calls need not wait.
        names = [name for name, _ in choice]
        entries = self._pool.select(names)
        with self._reading:
            state = self._find(choice, stale=stale)
            read = self._read_values(choice) if state is None else None
        if state is not None:
            return state
        prepared = {} if read is not None else {name: self._pool[name] for name in names}
        with self._lock:
            state = self._find(choice, stale=stale)
            if state is None and self._pool.select(names) == entries:
                state = self._keep(self.new(choice, prepared) if read is None else self._bind_slots(choice, *read))
        return state

    def _read_values(self, choice: Choice) -> tuple[SlotLayout, Tensor, Charge] | None:
        """Read the values of an adapter on disk into slots; return None where the adapter has to be prepared."""
        entry, base = self._find_stored(choice), self._kept.get(())
        if entry is None or base is None or base.bound is None or not self._engine.interfaces:
            return None
        assert isinstance(entry.source, StoredAdapter)
        structure = entry.source.structure
        if structure is None or (structure in self._moves and self._moves[structure] is None):
            return None
        if structure not in self._seen:  # an adapter is prepared in less time than it takes to find the moves
            self._seen.add(structure)
            return None
        begun, charge = time.monotonic(), self._pool.budget.claim(entry.source.nbytes)
        try:
            values = entry.source.read_values(structure)
            if values is not None and structure not in self._moves:
                self._moves[structure] = self._find_moves(structure, values, base.bound)
            moves = self._moves.get(structure)
            if values is None or moves is None:
                charge.resize(0)
                return None
            charge.resize(moves.layout.nbytes)
            slots = new_memory(moves.layout.nbytes)
            moves.fill(values, slots)
            charge.cover([slots])
        except BaseException:
            charge.resize(0)  # the error's traceback keeps the charge alive
            raise
        self._pool.read_seconds.append(time.monotonic() - begun)
        return moves.layout, slots, charge

    def _find_moves(self, structure: AdapterStructure, values: Tensor, base: BoundProgram) -> SlotMoves | None:
        """Return the moves from values of a structure into slots; None where a slot is computed in another way."""
        name, factors, shared = "", [1.0], base.placed_tensors()
        narrow = any(tensor.dtype.itemsize < torch.float32.itemsize for tensor in shared.values())
        if narrow or len(values) > _MOST_NUMBERED:  # engines refuse values that are too large for half precision
            return None
        numbered = structure.make_adapter(name, torch.arange(1, len(values) + 1))
        prepared = self._pool.preparer.number(structure.make_adapter(name, values), numbered, factors)
        if prepared is None:
            return None
        snapshot = compose_choice(self._plans, {name: prepared}, ((name, AS_TRAINED),), self._base)
        bound = self._engine.bind(snapshot, fill_slots(self._plans, snapshot, self._base, dict(self._idle)))
        own = self._find_own_slots(snapshot, bound, base)
        places = {} if own is None else {slot: own[slot] for slot in own if own[slot].dtype == torch.int64}
        if own is None or not all(torch.equal(own[slot], shared[slot]) for slot in own.keys() - places.keys()):
            return None
        try:
            return SlotMoves(snapshot, places, {slot: shared[slot].dtype for slot in places}, factors)
        except ValueError:
            return None

    def _find_own_slots(
        self, snapshot: ComposedWeights, bound: BoundProgram, base: BoundProgram
    ) -> dict[str, Tensor] | None:
        """Return the slots that differ from those of the empty choice; None where not all of them are a row's own."""
        shares = any(self._engine.why_apart(snapshot, graph) for graph in self._engine.interfaces)
        if shares or snapshot.invocations or snapshot.prefix is not None:
            return None
        shared = base.placed_tensors()
        return {
            name: tensor
            for name, tensor in bound.placed_tensors().items()
            if tensor.data_ptr() != shared[name].data_ptr() or tensor.shape != shared[name].shape
        }

    def _find(self, choice: Choice, *, stale: bool) -> ChoiceState | None:
        """Return the cached state of a choice, or None."""
        kept = self._kept.get(choice)
        if kept is None or not (stale or self._pool.has_versions(kept.entries, kept.versions)):
            return None
        self._pool.budget.touch((id(self), choice))
        return self._use(kept)

    def _keep(self, state: ChoiceState) -> ChoiceState:
        """Cache a state until memory is short, and return the copy that calls use."""
        choice = state.choice
        if self._find_stored(choice) is not None:
            state.entries[0].slots = weakref.ref(state.charge)
        take = functools.partial(operator.setitem, self._kept, choice, state)
        if not choice:  # the empty choice takes no memory
            take()
            return self._use(state)
        drop = functools.partial(self._evict, choice)
        self._pool.budget.keep(
            (id(self), choice), state.charge, take, drop, lambda: self._find_in_use(state) is not None
        )
        mixtures = [known for known in tuple(self._kept) if len(known) > 1 or (known and known[0][1] != AS_TRAINED)]
        for oldest in mixtures[:-_MAX_MIXTURES]:
            self._drop(oldest)
        return self._use(state)

    def _use(self, kept: ChoiceState) -> ChoiceState:
        """Return the copy of a cached state that calls use, so that eviction sees whether the state is in use."""
        with self._use_lock:
            used = self._find_in_use(kept)
            if used is None:
                used = replace(kept)
                self._in_use[kept.choice] = weakref.ref(used)
            return used

    def _find_in_use(self, kept: ChoiceState) -> ChoiceState | None:
        """Return the copy of a cached state that is in use, or None."""
        found = self._in_use.get(kept.choice)
        used = None if found is None else found()
        return used if used is not None and used.charge is kept.charge else None

    def _evict(self, choice: Choice) -> None:
        """Evict a state; at the second eviction of an adapter on disk, write its slots to the file of images.

        Writing the slots takes longer than reading the adapter once more, hence not at the first.
        """
        state, entry, base = self._kept.pop(choice, None), self._find_stored(choice), self._kept.get(())
        self._in_use.pop(choice, None)
        if state is None or entry is None or base is None or state.entries != (entry,) or not self._engine.interfaces:
            return
        name = choice[0][0]
        if self._images.find(name, entry) is not None or state.bound is None or base.bound is None:
            return
        if self._evicted.get(name) != entry.serial:
            self._evicted[name] = entry.serial
            return
        own = self._find_own_slots(state.snapshot, state.bound, base.bound)
        if own is not None:
            self._images.write(name, entry, state.snapshot, own)

    def _bring_back(self, choice: Choice) -> ChoiceState | None:
        """Read the state of an adapter on disk from its slot image; return None where it has no image."""
        if self._find_stored(choice) is None:
            return None
        with self._lock:
            state, entry = self._find(choice, stale=False), self._pool.find(choice[0][0])
            image = self._images.find(choice[0][0], entry) if state is None else None
            if image is None:
                return state
            begun, base = time.monotonic(), self.of(()).bound
            read = None if base is None else self._read_slots(image)
            if read is None:
                return None
            self._pool.read_seconds.append(time.monotonic() - begun)
            return self._keep(self._bind_slots(choice, image.layout, *read))

    def _bind_slots(self, choice: Choice, layout: SlotLayout, slots: Tensor, charge: Charge) -> ChoiceState:
        """Return the state of an adapter on disk whose slots were read."""
        entries, base = self._pool.select([name for name, _ in choice]), self.of(()).bound
        assert base is not None
        bound, versions = base.with_places(layout.view(slots)), self._pool.read_versions(entries)
        return ChoiceState(ComposedWeights(choice, layout.sites), bound, entries, versions, layout.nbytes, charge)

    def _read_slots(self, image: SlotImage) -> tuple[Tensor, Charge] | None:
        """Read a slot image; return its bytes and the charge of their memory, or None where it cannot be read.

        The memory is claimed first: reading into memory that an eviction just freed is faster than into new memory.
        """
        charge = self._pool.budget.claim(image.layout.nbytes)
        try:
            memory = new_memory(image.layout.nbytes)
            charge.cover([memory])
            return (memory, charge) if self._images.read(image, memory) else None
        except BaseException:
            charge.resize(0)  # the error's traceback keeps the charge alive
            raise

    def _find_stored(self, choice: Choice) -> PoolEntry | None:
        """Return the pool entry of a choice that is one adapter on disk at its trained strength, else None."""
        alone = len(choice) == 1 and choice[0][1] == AS_TRAINED
        entry = self._pool.entries.get(choice[0][0]) if alone else None
        return entry if entry is not None and entry.adapter is None else None

    def _drop(self, choice: Choice) -> None:
        self._kept.pop(choice, None)
        self._in_use.pop(choice, None)
        self._pool.budget.forget((id(self), choice))

    def bind_rows(self, states: Sequence[ChoiceState]) -> BoundProgram:
        """Return the engine's program bound to states that may share a call, one state for each part of the rows.

        Raises:
            OverBudget: the memory budget has no room for the binding.
        """
        budget, programs = self._pool.budget, [state.bound for state in states if state.bound is not None]
        if self._engine.computes_terms:
            return self._engine.bind_rows(programs)
        choices = tuple([state.choice for state in states])
        key = (id(self), "rows", choices)
        with self._lock:
            charges, bound = self._together.get(choices, ((), None))
            # A charge lives as long as its state is cached or in use.
            if bound is not None and all(known() is state.charge for known, state in zip(charges, states, strict=True)):
                budget.touch(key)
                return bound
            made = self._engine.bind_rows(programs)
            bound = replace(made, charge=budget.charge(made.own))
            assert bound.charge is not None
            binding = tuple(weakref.ref(state.charge) for state in states), bound
            take = functools.partial(operator.setitem, self._together, choices, binding)
            budget.keep(key, bound.charge, take, functools.partial(self._together.pop, choices, None))
            for oldest in tuple(self._together)[:-_MAX_TOGETHER]:
                self._together.pop(oldest, None)
            return bound

    def new(self, choice: Choice, prepared: Mapping[str, PreparedAdapter] | None = None) -> ChoiceState:
        """Compute the state of a choice; the cache is neither read nor written.

        Args:
            prepared: the adapters of the choice; default: the pool's.
        """
        with self._lock:
            entries = self._pool.select([name for name, _ in choice])
            versions = self._pool.read_versions(entries)
            snapshot = compose_choice(self._plans, self._pool if prepared is None else prepared, choice, self._base)
            if snapshot.prefix is not None and (self._engine.fused or self._engine.constant):
                raise _prefix_error(choice)
            bound, filled = None, list[Tensor]()
            if self._engine.constant:
                bound = self._engine.bind(snapshot, {})
            elif not self._engine.fused:
                with self._suggesting_reserve(choice):
                    slots = fill_slots(self._plans, snapshot, self._base, self._idle)
                bound = self._engine.bind(snapshot, slots)
                bound = bound if snapshot.prefix is None else replace(bound, prefix=snapshot.prefix)
                filled = [tensor for path in snapshot.composed for tensor in slots[path].named().values()]
            charge = self._pool.budget.charge((*snapshot.tensors(), *filled))
            nbytes = sum(tensor.nbytes for tensor in filled)
            return ChoiceState(snapshot, bound, entries, versions, nbytes, charge)

    def save(self, choice: Choice, graph: str, path: str | Path) -> None:
        """Write a choice as a file in the engine's format, atomically; no state of the choice is computed."""
        target = parse_path(path, "the path of save_choice", FormatError, "unreadable")
        snapshot = compose_choice(self._plans, self._pool, choice, self._base)
        if snapshot.invocations:
            raise no_prompt_error(snapshot.invocations)
        if snapshot.prefix is not None:
            raise _prefix_error(choice)
        writing = translate_os_errors(target, FormatError, "written", code="unreadable")
        with writing, replace_atomically(target) as staged, self._suggesting_reserve(choice):
            self._engine.write_choice(snapshot, graph, staged)

    @contextlib.contextmanager
    def _suggesting_reserve(self, choice: Choice) -> Iterator[None]:
        """Add the ``reserve=`` with which the choice fits to a ``NeedsRecompile`` raised in the block."""
        try:
            yield
        except NeedsRecompile as error:
            reserve = suggest_reserve([self._pool[name] for name, _ in choice])
            raise NeedsRecompile(
                f"{describe_choice(choice)} does not fit together: {error.what}",
                next_step=f"compile again with {reserve}",
            ) from error

    def forget(self, name: str) -> None:
        """Drop every cached state that includes an adapter; running calls keep the states that they use."""
        self._images.forget(name)
        self._evicted.pop(name, None)
        for choice in [choice for choice in tuple(self._kept) if name in dict(choice)]:
            self._drop(choice)
        for choices in [choices for choices in tuple(self._together) if any(name in dict(one) for one in choices)]:
            self._together.pop(choices, None)

    def clear(self) -> None:
        """Drop all cached states, because the model's own tensors were replaced."""
        self._idle = {}
        self._images.clear()
        self._together.clear()
        for choice in tuple(self._kept):
            self._drop(choice)


def _prefix_error(choice: Choice) -> Unavailable:
    return Unavailable(
        f"{describe_choice(choice)} puts virtual tokens before sequences, and neither weights nor slot files hold "
        "those",
        next_step="compile with mode='live' (or 'auto'), and call lorac's own program with the adapter",
    )
