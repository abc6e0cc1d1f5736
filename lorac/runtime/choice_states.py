"""States: what a choice of adapters comes to in an engine, made when it is first asked for and kept."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorac.errors import FormatError, NeedsRecompile
from lorac.ir.sites import BaseReader
from lorac.ir.slots.choice import Active, Choice, describe_choice
from lorac.ir.slots.composition import ComposedWeights, compose_choice, fill_slots
from lorac.ir.slots.plans import SitePlan, SiteSlots
from lorac.runtime.adapter_pool import AdapterPool, TensorVersions, read_versions
from lorac.runtime.capacity import suggest_reserve
from lorac.storage.atomic_folders import replace_atomically
from lorac.storage.os_errors import translate_os_errors
from lorac.target.binding import BoundProgram
from lorac.target.engine import Engine

_MAX_MIXTURES = 8
"""States kept for mixtures and strengths; those of whole single adapters are kept as long as the adapter is."""


@dataclass(frozen=True, eq=False)
class ChoiceState:
    """What calls run with: replaced whole, so a call that took it at its start is never half-changed.

    It holds its adapters, so that a call may end with one that was removed meanwhile.

    Attributes:
        snapshot: the choice, and what it comes to at every site.
        bound: the engine's binding; None where weights are written instead.
        adapters: those of the choice.
        written: how their tensors were when it was made.
        nbytes: what its slots take.
    """

    snapshot: ComposedWeights
    bound: BoundProgram | None
    adapters: tuple[Any, ...]
    written: TensorVersions
    nbytes: int

    @property
    def choice(self) -> Choice:
        """Its choice."""
        return self.snapshot.choice

    @property
    def stale(self) -> bool:
        """Whether a tensor of its adapters was written, or exchanged for another, since."""
        return self.written.versions != read_versions(self.adapters).versions


class ChoiceStates:
    """The states of a compiled model.

    Args:
        engine: binds their slots.
        plans: the slots of every site.
        pool: the adapters.
        base: reads base weights.
        lock: held while one is made, and while the pool changes.

    Attributes:
        kept: the states that are made, by choice.
    """

    def __init__(
        self, engine: Engine, plans: Mapping[str, SitePlan], pool: AdapterPool, base: BaseReader, lock: threading.RLock
    ) -> None:
        self.engine, self.plans, self.pool, self.base = engine, plans, pool, base
        self._lock = lock
        self.kept: dict[Choice, ChoiceState] = {}
        self._idle: dict[str, SiteSlots] = {}

    def of(self, choice: Choice, *, stale: bool = False) -> ChoiceState:
        """The state of a choice.

        Args:
            choice: the choice.
            stale: one made before its adapters were trained will do.

        Raises:
            AdapterNotFound: an adapter of the choice is not there any more.
            NeedsRecompile: its adapters do not fit together.
        """
        with self._lock:
            kept = self.kept.get(choice)
            if kept is not None and (stale or not kept.stale):
                return kept
            state = self._make(choice)
            self.kept[choice] = state
            mixed = [known for known in self.kept if len(known) > 1 or (known and known[0][1] != Active())]
            for oldest in mixed[:-_MAX_MIXTURES]:
                del self.kept[oldest]
            return state

    def new(self, choice: Choice) -> ChoiceState:
        """The state of a choice, made now, which nobody else gets."""
        with self._lock:
            return self._make(choice)

    def save(self, choice: Choice, graph: str, path: Path) -> None:
        """Have the engine write what a choice comes to, in one step; no state is made of it, nor kept."""
        snapshot = compose_choice(self.plans, self.pool, choice, self.base)
        with (
            translate_os_errors(path, FormatError, "written", "unreadable"),
            replace_atomically(path) as staged,
            self._fitting(choice),
        ):
            self.engine.write_choice(snapshot, graph, staged)

    @contextlib.contextmanager
    def _fitting(self, choice: Choice) -> Iterator[None]:
        """What is lacking of room inside the block, told with what would admit the choice."""
        try:
            yield
        except NeedsRecompile as error:
            together = suggest_reserve([self.pool[name] for name, _ in choice])
            raise NeedsRecompile(
                f"{describe_choice(choice)} does not fit together: {error.what}",
                next_step=f"compile again with {together}",
            ) from error

    def touched(self, before: ChoiceState, choice: Choice) -> set[str]:
        """The sites whose slots change when a choice takes the place of a state."""
        if choice == before.choice and not before.stale:
            return set()
        return {path for name, _ in (*choice, *before.choice) for path in self.pool[name].paths}

    def forget(self, name: str) -> None:
        """Let go of every state that an adapter is part of."""
        self.kept = {choice: state for choice, state in self.kept.items() if name not in dict(choice)}

    def clear(self) -> None:
        """Let go of all states: the model has other tensors now."""
        self.kept, self._idle = {}, {}

    def _make(self, choice: Choice) -> ChoiceState:
        adapters = self.pool.named(tuple(name for name, _ in choice))
        now = read_versions(adapters)
        snapshot = compose_choice(self.plans, self.pool, choice, self.base)
        if self.engine.fused:
            return ChoiceState(snapshot, None, adapters, now, 0)
        if self.engine.constant:
            return ChoiceState(snapshot, self.engine.bind(snapshot, {}), adapters, now, 0)
        with self._fitting(choice):
            slots = fill_slots(self.plans, snapshot, self.base, self._idle)
        nbytes = sum(t.nbytes for path in snapshot.composed for t in slots[path].named().values())
        return ChoiceState(snapshot, self.engine.bind(snapshot, slots), adapters, now, nbytes)
