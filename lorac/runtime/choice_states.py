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
from lorac.errors import FormatError, NeedsRecompile, Unavailable
from lorac.ir.sites.site import BaseReader
from lorac.ir.slots.choice import AS_TRAINED, Choice, describe_choice
from lorac.ir.slots.composition import ComposedWeights, compose_choice, fill_slots
from lorac.ir.slots.invocation import no_prompt_error
from lorac.ir.slots.plans import PreparedAdapter, SitePlan, SiteSlots
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
        entries = self._pool.select([name for name, _ in choice])
        prepared = {name: self._pool[name] for name, _ in choice}
        with self._lock:
            state = self._find(choice, stale=stale)
            if state is None and self._pool.select([*prepared]) == entries:
                state = self._keep(self.new(choice, prepared))
        return state

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
        if state is None or entry is None or base is None or state.entries != (entry,) or state.snapshot.prefix:
            return
        name, engine = choice[0][0], self._engine
        shares = state.snapshot.invocations or any(
            engine.why_apart(state.snapshot, graph) for graph in engine.interfaces
        )
        if self._images.find(name, entry) is not None or not engine.interfaces or shares:
            return
        if self._evicted.get(name) != entry.serial:
            self._evicted[name] = entry.serial
            return
        assert state.bound is not None
        assert base.bound is not None
        shared, own = base.bound.placed_tensors(), state.bound.placed_tensors()
        own = {n: t for n, t in own.items() if t.data_ptr() != shared[n].data_ptr() or t.shape != shared[n].shape}
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
            if base is None or read is None:
                return None
            self._pool.read_seconds.append(time.monotonic() - begun)
            slots, charge = read
            layout, versions = image.layout, self._pool.read_versions((entry,))
            bound = base.with_places(layout.view(slots))
            snapshot = ComposedWeights(choice, layout.sites)
            return self._keep(ChoiceState(snapshot, bound, (entry,), versions, layout.nbytes, charge))

    def _read_slots(self, image: SlotImage) -> tuple[Tensor, Charge] | None:
        """Read a slot image; return its bytes and the charge of their memory, or None where it cannot be read.

        The memory is claimed first: reading into memory that an eviction just freed is faster than into new memory.
        """
        charge = self._pool.budget.claim(image.layout.nbytes)
        try:
            memory = torch.empty(image.layout.nbytes, dtype=torch.uint8)
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
