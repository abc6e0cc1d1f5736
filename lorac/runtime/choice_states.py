"""The state of an engine for each choice of adapters, made when it is first needed and cached."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lorac.adapters.pool import AdapterPool, TensorVersions
from lorac.errors import FormatError, NeedsRecompile
from lorac.ir.sites import BaseReader
from lorac.ir.slots.choice import Active, Choice, describe_choice
from lorac.ir.slots.composition import ComposedWeights, compose_choice, fill_slots
from lorac.ir.slots.plans import SitePlan, SiteSlots
from lorac.runtime.capacity import suggest_reserve
from lorac.storage.atomic_folders import replace_atomically
from lorac.storage.os_errors import translate_os_errors
from lorac.storage.user_paths import parse_path
from lorac.target.engine import BoundProgram, Engine
from lorac.variants.adapter import Adapter

_MAX_MIXTURES = 8
"""Cached states of mixtures and strengths. The state of one whole adapter is cached as long as the adapter exists."""


@dataclass(frozen=True, eq=False)
class ChoiceState:
    """A choice of adapters as calls use it.

    It is replaced whole, so that a call never sees a half-changed one. It holds its adapters, so that a call can end
    with an adapter that was removed meanwhile.

    Attributes:
        snapshot: the choice, composed at every site.
        bound: the engine's binding; None if the engine writes weights instead.
        pool: reads the versions of tensors.
        adapters: the adapters of the choice.
        versions: the versions of their tensors from which the state was made.
        nbytes: size of its slots in bytes.
    """

    snapshot: ComposedWeights
    bound: BoundProgram | None
    pool: AdapterPool
    adapters: tuple[Adapter, ...]
    versions: TensorVersions
    nbytes: int

    @property
    def choice(self) -> Choice:
        """The choice."""
        return self.snapshot.choice

    @property
    def stale(self) -> bool:
        """Whether a tensor of its adapters was written or exchanged since the state was made."""
        return not self.versions.agrees(self.pool.read_versions(self.adapters, self.versions))


class ChoiceStates:
    """The states of a compiled model.

    Args:
        engine: binds the slots.
        plans: the slots of every site.
        pool: the adapters.
        base: reads base weights.
        lock: held while a state is made and while the pool changes.

    Attributes:
        cached: choice -> its state.
    """

    def __init__(
        self, engine: Engine, plans: Mapping[str, SitePlan], pool: AdapterPool, base: BaseReader, lock: threading.RLock
    ) -> None:
        self._engine, self._plans, self._pool, self._base = engine, plans, pool, base
        self._lock = lock
        self.cached: dict[Choice, ChoiceState] = {}
        self._idle: dict[str, SiteSlots] = {}

    def of(self, choice: Choice, *, stale: bool = False) -> ChoiceState:
        """Return the state of a choice.

        Args:
            choice: the choice.
            stale: accept a state that was made before its adapters were trained.

        Raises:
            AdapterNotFound: an adapter of the choice was removed.
            NeedsRecompile: its adapters do not fit together.
        """
        with self._lock:
            cached = self.cached.get(choice)
            if cached is not None and (stale or not cached.stale):
                return cached
            state = self.cached[choice] = self.new(choice)
            mixtures = [known for known in self.cached if len(known) > 1 or (known and known[0][1] != Active())]
            for oldest in mixtures[:-_MAX_MIXTURES]:
                del self.cached[oldest]
            return state

    def new(self, choice: Choice) -> ChoiceState:
        """Make the state of a choice, without looking into the cache or storing it there."""
        with self._lock:
            adapters = self._pool.select([name for name, _ in choice])
            versions = self._pool.read_versions(adapters)
            snapshot = compose_choice(self._plans, self._pool, choice, self._base)
            if self._engine.fused:
                return ChoiceState(snapshot, None, self._pool, adapters, versions, 0)
            if self._engine.constant:
                return ChoiceState(snapshot, self._engine.bind(snapshot, {}), self._pool, adapters, versions, 0)
            with self._suggesting_reserve(choice):
                slots = fill_slots(self._plans, snapshot, self._base, self._idle)
            nbytes = sum(t.nbytes for path in snapshot.composed for t in slots[path].named().values())
            return ChoiceState(snapshot, self._engine.bind(snapshot, slots), self._pool, adapters, versions, nbytes)

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

    def touched(self, before: ChoiceState, choice: Choice) -> set[str]:
        """Return the sites whose slots change when a choice replaces a state."""
        if choice == before.choice and not before.stale:
            return set()
        return {path for name, _ in (*choice, *before.choice) for path in self._pool[name].paths}

    def forget(self, name: str) -> None:
        """Drop every state that an adapter is part of."""
        self.cached = {choice: state for choice, state in self.cached.items() if name not in dict(choice)}

    def clear(self) -> None:
        """Drop all states, because the model's own tensors were exchanged."""
        self.cached, self._idle = {}, {}
