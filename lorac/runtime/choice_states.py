"""The state of an engine for each choice of adapters, made when it is needed and kept while there is room."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from lorac.adapters.pool import AdapterPool, PoolEntry, TensorVersions
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
from lorac.runtime.slot_images import SlotImages
from lorac.storage.atomic_folders import replace_atomically
from lorac.storage.paths import parse_path, translate_os_errors
from lorac.target.engine import BoundProgram, Engine
from lorac.target.memory_budget import Charge

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
    lease: _Lease | None = None

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
        if state is not None:
            return state
        # Adapters are read and prepared without the lock, which other calls need.
        prepared = {name: self._pool[name] for name, _ in choice}
        with self._lock:
            state = self._find(choice, stale=stale)
            return self._keep(self.new(choice, prepared)) if state is None else state

    def _find(self, choice: Choice, *, stale: bool) -> ChoiceState | None:
        """Return the state of a choice if it is kept."""
        kept = self._kept.get(choice)
        if kept is None or not (stale or not kept.state.stale):
            return None
        self._pool.budget.touch((id(self), choice))
        return kept.hand_out()

    def _keep(self, state: ChoiceState) -> ChoiceState:
        """Keep a state while there is room, and return it for use."""
        choice = state.choice
        kept = self._kept[choice] = _KeptState(state)
        self._base_program = self._base_program if choice else state.bound
        drop = functools.partial(self._let_go, choice)
        self._pool.budget.keep((id(self), choice), state.charge, drop, kept.is_in_use)
        mixtures = [known for known in tuple(self._kept) if len(known) > 1 or (known and known[0][1] != Active())]
        for oldest in mixtures[:-_MAX_MIXTURES]:
            self._drop(oldest)
        return kept.hand_out()

    def _let_go(self, choice: Choice) -> None:
        """Keep a state no longer, for want of room; of an adapter on disk, what its slots held is written there."""
        kept, entry = self._kept.pop(choice, None), self._find_stored(choice)
        if kept is None or entry is None or self._base_program is None or kept.state.entries != (entry,):
            return
        if self._images.find(choice[0][0], entry) is not None:
            return
        state = kept.state
        if any(self._engine.why_apart(state.snapshot, graph) for graph in self._engine.interfaces):
            return
        base = self._placed_tensors(self._base_program)
        assert state.bound is not None
        own = {n: t for n, t in self._placed_tensors(state.bound).items() if not _is_same(t, base[n])}
        self._images.write(choice[0][0], entry, state.snapshot, own)

    def _bring_back(self, choice: Choice) -> ChoiceState | None:
        """Return the state of an adapter on disk from what its slots held when it was let go of, if it was."""
        if self._find_stored(choice) is None:
            return None
        with self._lock:
            state, entry = self._find(choice, stale=False), self._pool.find(choice[0][0])
            image = self._images.find(choice[0][0], entry) if state is None else None
            if image is None:
                return state
            begun = time.monotonic()
            memory = torch.empty(image.nbytes, dtype=torch.uint8)
            charge, base = self._pool.budget.charge([memory]), self.of(()).bound
            if base is None or not self._images.read(image, memory):
                return None
            self._pool.read_seconds.append(time.monotonic() - begun)
            snapshot = ComposedWeights(choice, image.layout.sites)
            bound = self._engine.bind_places(base.content, image.layout.view(memory))  # type: ignore[arg-type]  # its own
            versions = self._pool.read_versions((entry,))
            return self._keep(ChoiceState(snapshot, bound, self._pool, (entry,), versions, image.nbytes, charge))

    def _find_stored(self, choice: Choice) -> PoolEntry | None:
        """Return the entry of a choice that is one adapter on disk as it is, else None."""
        alone = len(choice) == 1 and choice[0][1] == Active()
        entry = self._pool.entries.get(choice[0][0]) if alone else None
        return entry if entry is not None and entry.adapter is None else None

    def _placed_tensors(self, program: BoundProgram) -> dict[str, Tensor]:
        return self._engine.placed_tensors(program.content)  # type: ignore[arg-type]  # its own

    def _drop(self, choice: Choice) -> None:
        self._kept.pop(choice, None)
        self._pool.budget.forget((id(self), choice))

    def bind_rows(self, states: Sequence[ChoiceState]) -> BoundProgram:
        """Return the engine's binding of states that may share a call, one for each part of its rows.

        Raises:
            OverBudget: there is no room for it.
        """
        budget, contents = self._pool.budget, [state.bound.content for state in states if state.bound is not None]
        if self._engine.computes_terms:
            return self._engine.bind_rows(contents)  # type: ignore[arg-type]  # its own
        with self._lock:
            number = next((n for n, known in tuple(self._together.items()) if known.is_of(states)), None)
            known = None if number is None else self._together.get(number)
            if known is not None:
                budget.touch((id(self), number))
                return known.bound
            made = self._engine.bind_rows(contents)  # type: ignore[arg-type]  # its own
            charge = budget.charge(made.own)
            number, bound = next(self._numbers), replace(made, charge=charge)
            charges = tuple(weakref.ref(state.charge) for state in states)
            self._together[number] = _RowsBinding(tuple(state.choice for state in states), charges, bound)
            budget.keep((id(self), number), charge, functools.partial(self._together.pop, number, None))
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
