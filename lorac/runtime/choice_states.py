"""The state of an engine for each choice of adapters, made when it is first needed and cached."""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from lorac.adapters.pool import AdapterPool, TensorVersions
from lorac.errors import FormatError, NeedsRecompile
from lorac.ir.algebra import operands
from lorac.ir.algebra.changes import LowRank
from lorac.ir.sites import KINDS_WITHOUT_WEIGHT, BaseReader, Site, SiteKind
from lorac.ir.slots.choice import Active, Choice, describe_choice
from lorac.ir.slots.composition import ComposedWeights, compose_choice, fill_slots
from lorac.ir.slots.filling import find_branch_misfit, find_misfit
from lorac.ir.slots.planning import Reserve, needs_merged_weight, quantized_merge_error
from lorac.ir.slots.plans import PreparedAdapter, SitePlan, SiteSlots
from lorac.ir.slots.roles import ROLES, roles_needed
from lorac.storage.atomic_folders import replace_atomically
from lorac.storage.paths import parse_path, translate_os_errors
from lorac.target.engine import BoundProgram, Engine
from lorac.variants.adapter import Adapter

_MAX_MIXTURES = 8
"""Cached states of mixtures and strengths. The state of one whole adapter is cached as long as the adapter exists."""


_MAX_TOGETHER = 4
"""Cached bindings of several choices in one call."""


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
        self._together: list[tuple[tuple[ChoiceState, ...], BoundProgram]] = []

    def of(self, choice: Choice, *, stale: bool = False) -> ChoiceState:
        """Return the state of a choice.

        Args:
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

    def bind_rows(self, states: Sequence[ChoiceState]) -> BoundProgram:
        """Return the engine's binding of states that may share a call, one for each part of its rows."""
        with self._lock:
            for known, bound in self._together:
                if len(known) == len(states) and all(map(operator.is_, known, states)):
                    return bound
            programs = [state.bound for state in states if state.bound is not None]
            bound = self._engine.bind_rows([program.content for program in programs])  # type: ignore[misc]  # its own
            self._together = [*self._together[1 - _MAX_TOGETHER :], (tuple(states), bound)]
            return bound

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
        self._together = [
            entry for entry in self._together if all(name not in dict(state.choice) for state in entry[0])
        ]

    def clear(self) -> None:
        """Drop all states, because the model's own tensors were exchanged."""
        self.cached, self._idle, self._together = {}, {}, []


def suggest_reserve(together: Sequence[PreparedAdapter]) -> str:
    """Return the ``reserve=`` argument that would admit adapters that are active together."""
    paths = sorted({path.rpartition(".")[2] for prepared in together for path in prepared.paths})
    changes = [change for prepared in together for change in prepared.changes.values()]
    rank = max((change.rank for change in changes if isinstance(change, LowRank)), default=0)
    # A role without a field of its own is admitted through a bound weight.
    needed = {role.reserve or ROLES[operands.WEIGHT].reserve for change in changes for role in roles_needed(change)}
    arguments = [f"targets={paths}", f"rank={rank}"]
    arguments += [f"adapters={len(together)}"] if len(together) > 1 else []
    arguments += [f"{field.name}=True" for field in fields(Reserve) if field.name in needed and field.default is False]
    return f"reserve=lorac.Reserve({', '.join(arguments)})"


def check_capacity(
    name: str, prepared: PreparedAdapter, plans: Mapping[str, SitePlan], sites: Mapping[str, Site]
) -> None:
    """Check that an adapter fits the plans.

    Raises:
        NeedsRecompile: it does not fit; the message has the ``reserve=`` that admits it.
        CompileError: it needs a merged weight at a quantised weight, which no reserve admits.
    """
    problems = []
    for path, change in prepared.changes.items():
        plan = plans.get(path)
        reason = "has no slot" if plan is None or plan.empty else find_misfit(plan, change)
        problems += [(path, reason)] if reason else []
    for path, term in prepared.branches.items():
        reason = find_branch_misfit(plans.get(path), term)
        problems += [(path, reason)] if reason else []
    for path in [path for path, _ in problems if path in prepared.changes and path in sites]:
        if sites[path].packed and needs_merged_weight(sites[path], prepared.changes[path]):
            raise quantized_merge_error(sites[path], f", and adapter '{name}' needs a merged weight there")
    if problems:
        path, reason = problems[0]
        raise NeedsRecompile(
            f"adapter '{name}' does not fit: '{path}' {reason} ({len(problems)} sites in all)",
            next_step=f"compile again with {_suggest_room(prepared, sites)}the adapter in adapters=",
        )


def _suggest_room(prepared: PreparedAdapter, sites: Mapping[str, Site]) -> str:
    """Return the reserve that would admit an adapter; none does for blocks, branches and bare parameters."""
    kinds = {sites[path].kind if path in sites else SiteKind.PARAMETER for path in prepared.paths}
    if prepared.branches or kinds & KINDS_WITHOUT_WEIGHT:
        return ""
    return f"{suggest_reserve([prepared])}, or with "
