"""``Compiled``: a model and its adapters, ready to call; swaps, adds, removes and explains."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorac.errors import NeedsRecompile, Unavailable
from lorac.ir.choice import Active, Choice, Spec, parse_choice, spell
from lorac.ir.engine import Engine
from lorac.ir.forms import LowRank
from lorac.ir.sites import Site
from lorac.ir.slots import Prepared, SitePlan, branch_misfit, does_not_fit
from lorac.ir.snapshot import BaseReader, Snapshot, compose_choice, slots_of
from lorac.runtime.locks import ReadWriteLock
from lorac.runtime.pool import Pool
from lorac.runtime.report import SwapReport

UNSET: Any = object()
"""No choice was given: use the active one."""
_CACHED_MIXTURES = 8
"""Bindings kept for mixtures; those of single adapters are kept as long as the adapter is."""


@dataclass(frozen=True)
class Services:
    """What only the compiler can do, handed to the runtime.

    Attributes:
        load: (source, name) -> adapter: read a file, or make a fresh variant's tensors.
        prepare: adapter -> its normal forms.
        recompile: (target, mode, **options) -> another Compiled, from the host model.
        save: (compiled, folder) -> None.
        explain: compiled -> report.
    """

    load: Callable[[Any, str | None], Any]
    prepare: Callable[[Any], Prepared]
    recompile: Callable[..., Any]
    save: Callable[[Any, Any], None]
    explain: Callable[[Any], Any]


@dataclass(frozen=True, eq=False)
class _State:
    """What calls run with: replaced whole, so a call that took it at its start is never half-changed."""

    snapshot: Snapshot
    binding: Any
    version: tuple[int, ...]
    nbytes: int

    @property
    def choice(self) -> Choice:
        return self.snapshot.choice


class Compiled:
    """The result of ``lorac.compile``.

    Calling it answers as the model does. ``adapters=`` in a call chooses for that call only.
    """

    def setup(
        self,
        *,
        engine: Engine,
        plans: Mapping[str, SitePlan],
        sites: Mapping[str, Site],
        base: BaseReader,
        pool: Pool,
        services: Services,
        mode: str,
    ) -> None:
        """Put the parts together (the compiler's business)."""
        self.engine, self.plans, self.sites, self.base = engine, plans, sites, base
        self.pool, self.services, self.mode = pool, services, mode
        self._swaps = threading.RLock()
        self._calls = ReadWriteLock()
        self._cache: dict[Choice, _State] = {}
        self._state = self._make_state(())
        if not engine.fused:
            self._activate(self._state)

    # --- calling -----------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, adapters: Any = UNSET, **kwargs: Any) -> Any:
        """Answer as the model does: its own output type; torch or numpy as it came."""
        return self.call(args, kwargs, adapters)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any], adapters: Any = UNSET) -> Any:
        """One call, with the active adapters or with a choice of its own."""
        if isinstance(adapters, Sequence) and not isinstance(adapters, str):
            return self._call_rows(args, kwargs, adapters)
        if self.engine.fused:
            return self._call_fused(args, kwargs, adapters)
        state = self._state if adapters is UNSET else self._state_for(parse_choice(adapters, self.pool))
        return self.engine.run(self._fresh(state).binding, args, kwargs)

    def _call_fused(self, args: tuple[Any, ...], kwargs: dict[str, Any], adapters: Any) -> Any:
        if adapters is UNSET:
            with self._calls.reading():
                return self.engine.run(None, args, kwargs)
        choice = parse_choice(adapters, self.pool)
        with self._swaps, self._calls.writing():
            before = self._state.snapshot
            self.engine.write(self._make_state(choice).snapshot)
            try:
                return self.engine.run(None, args, kwargs)
            finally:
                self.engine.write(before)

    def _call_rows(self, args: tuple[Any, ...], kwargs: dict[str, Any], adapters: Sequence[Spec]) -> Any:
        from lorac.runtime.rows import run_rows

        return run_rows(lambda a, k, choice: self.call(a, k, choice), args, kwargs, adapters)

    # --- swapping ----------------------------------------------------------------------------------------------

    @property
    def active(self) -> dict[str, float]:
        """Name -> strength of what is active."""
        return spell(self._state.choice)

    def swap(self, adapters: Spec) -> SwapReport:
        """Make a choice the active one: a name, ``{name: strength}``, or None.

        Running calls end with the adapters they began with. A swap that fails changes nothing.

        Raises:
            AdapterNotFound, ChoiceError: what is asked for does not exist or makes no sense.
        """
        begun = time.perf_counter()
        self.refuse_baked()
        choice = parse_choice(adapters, self.pool)
        with self._swaps:
            touched = {p for name, _ in (*choice, *self._state.choice) for p in self.pool[name].paths}
            if self.engine.fused:
                written, blocked = self._write(choice)
            else:
                written, blocked = self._bind(choice), 0.0
        return SwapReport("bound", len(touched), written, time.perf_counter() - begun, blocked)

    def _bind(self, choice: Choice) -> int:
        self._activate(self._state_for(choice))
        return self._state.nbytes

    def _activate(self, state: _State) -> None:
        self._state = state
        self.engine.activate(state.binding)

    def _write(self, choice: Choice) -> tuple[int, float]:
        state = self._make_state(choice)
        before = self._state.snapshot
        begun = time.perf_counter()
        with self._calls.writing():
            try:
                written = self.engine.write(state.snapshot)
            except BaseException:
                self.engine.write(before)
                raise
        self._state = state
        return written, time.perf_counter() - begun

    def _state_for(self, choice: Choice) -> _State:
        with self._swaps:
            cached = self._cache.get(choice)
            if cached is not None and cached.version == self._version(choice):
                return cached
            state = self._make_state(choice)
            self._cache[choice] = state
            mixtures = [known for known in self._cache if len(known) > 1]
            for oldest in mixtures[:-_CACHED_MIXTURES]:
                del self._cache[oldest]
            return state

    def _make_state(self, choice: Choice) -> _State:
        version = self._version(choice)
        snapshot = compose_choice(self.plans, self.pool, choice, self.base)
        if self.engine.fused:
            return _State(snapshot, None, version, 0)
        slots = slots_of(self.plans, snapshot, self.base)
        nbytes = sum(t.nbytes for path in snapshot.composed for t in slots[path].named().values())
        return _State(snapshot, self.engine.bind(snapshot, slots), version, nbytes)

    def _fresh(self, state: _State) -> _State:
        """The state, made anew where its adapters were trained since."""
        if state.version == self._version(state.choice):
            return state
        renewed = self._state_for(state.choice)
        if state is self._state:
            self._activate(renewed)
        return renewed

    def _version(self, choice: Choice) -> tuple[int, ...]:
        return self.pool.version(tuple(name for name, _ in choice))

    # --- adding and removing -----------------------------------------------------------------------------------

    @property
    def adapters(self) -> dict[str, Any]:
        """Name -> adapter."""
        return self.pool.adapters

    def add_adapter(self, source: Any, name: str | None = None) -> str:
        """Register an adapter at run time, without a rebuild; returns its name.

        Args:
            source: a path, an Adapter, or a fresh Variant.
            name: its name; default: the folder's, the adapter's own, or the variant's.

        Raises:
            NeedsRecompile: more sites, rank or kinds of slots than were reserved; nothing was registered.
            AdapterExists: the name is taken.
        """
        self.refuse_baked()
        adapter = self.services.load(source, name)
        prepared = self.pool.prepare(adapter)
        self.refuse_misfit(adapter.name, prepared)
        self.pool.put(adapter, prepared)
        self.registered(adapter)
        if not self.engine.fused:
            self._state_for(((adapter.name, Active()),))
        return str(adapter.name)

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter. An active one is first taken out of the active choice."""
        self.refuse_baked()
        with self._swaps:
            prepared = self.pool[name]
            remaining = {n: how for n, how in self._state.choice if n != name}
            if len(remaining) != len(self._state.choice):
                self.swap(remaining)
            self.pool.drop(name)
            self._cache = {choice: s for choice, s in self._cache.items() if name not in dict(choice)}
            self.engine.forget(prepared)
        self.unregistered(name)

    def mark_baked(self, choice: Choice) -> None:
        """Record what a baked engine holds (the compiler's business)."""
        self._state = self._make_state(choice)

    def refuse_baked(self) -> None:
        """Raise ``Unavailable`` where the adapters are constants of the program."""
        if self.mode == "baked":
            raise Unavailable(
                "the adapters of a baked model are constants and cannot be changed",
                next_step="compile with mode='live' or 'fused' to swap",
            )

    def registered(self, adapter: Any) -> None:
        """Hook: an adapter was added (eager registers its parameters)."""

    def unregistered(self, name: str) -> None:
        """Hook: an adapter was removed."""

    def refuse_misfit(self, name: str, prepared: Prepared) -> None:
        """Raise ``NeedsRecompile`` where an adapter does not fit the plans, with the ``reserve=`` that admits it."""
        problems = []
        for path, value in prepared.values.items():
            plan = self.plans.get(path)
            reason = "has no slot" if plan is None or plan.empty else does_not_fit(plan, value)
            if reason:
                problems.append((path, reason))
        for path, term in prepared.branches.items():
            reason = branch_misfit(self.plans.get(path), term)
            if reason:
                problems.append((path, reason))
        if problems:
            path, reason = problems[0]
            raise NeedsRecompile(
                f"adapter '{name}' does not fit: '{path}' {reason} ({len(problems)} sites in all)",
                next_step=f"compile again with {admitting_reserve(prepared)}, or with the adapter in adapters=",
            )

    # --- the rest of the interface -------------------------------------------------------------------------------

    def explain(self) -> Any:
        """Per site: what was done with each term, and why not something cheaper."""
        return self.services.explain(self)

    def export(self, target: str = "onnxruntime", mode: str = "auto", **options: Any) -> Any:
        """Compile again from the host model, with the adapters as they now are."""
        return self.services.recompile(self, target=target, mode=mode, **options)

    def save(self, folder: Any) -> None:
        """Write everything needed to run this elsewhere to ``folder``."""
        self.services.save(self, folder)


def admitting_reserve(prepared: Prepared) -> str:
    """The ``reserve=`` argument that would admit an adapter."""
    paths = sorted({path.rpartition(".")[2] for path in prepared.paths})
    ranks = [v.rank for v in prepared.values.values() if isinstance(v, LowRank)]
    scales = any(isinstance(v, LowRank) and (v.c is not None or v.e is not None) for v in prepared.values.values())
    whole = any(not isinstance(v, LowRank) or v.d is not None for v in prepared.values.values())
    extras = (", scales=True" if scales else "") + (", weights=True" if whole else "")
    return f"reserve=lorac.Reserve(targets={paths}, rank={max(ranks, default=0)}{extras})"
