"""Choosing adapters of an engine while it runs: for a call, for a block of calls, and until the next swap."""

import concurrent.futures
import contextlib
import functools
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from lorac.adapters.pool import AdapterPool
from lorac.errors import Unavailable
from lorac.frontend.components import MAIN_GRAPH
from lorac.ir.sites.site import BaseReader
from lorac.ir.slots.choice import UNSET, Choice, ChoiceSpec, choice_strengths, parse_choice
from lorac.ir.slots.composition import ComposedWeights
from lorac.ir.slots.places import choose_places
from lorac.ir.slots.plans import SitePlan
from lorac.runtime.choice_states import ChoiceState, ChoiceStates
from lorac.runtime.held_choice import HeldChoice
from lorac.runtime.locks import ReadWriteLock
from lorac.runtime.row_bank import RowBank
from lorac.runtime.row_group import RowGroup
from lorac.runtime.swap_report import SwapReport
from lorac.target.engine import BoundProgram, Engine, RowsApart
from lorac.variants.adapter import Adapter

T = TypeVar("T")


class ChoiceSwitch(ABC):
    """An engine with a choice of adapters. Every method may be called from any thread.

    Args:
        engine: runs the program.
        plans: the slots of every touched site.
        base: reads base weights.
        mode: ``"live"``, ``"fused"`` or ``"baked"``.
    """

    def __init__(
        self, engine: Engine, plans: Mapping[str, SitePlan], pool: AdapterPool, base: BaseReader, mode: str
    ) -> None:
        self.engine, self.plans, self.pool, self.base, self.mode = engine, plans, pool, base, mode
        self._swap_lock, self._call_lock = threading.RLock(), ReadWriteLock()
        engine.memory_budget = pool.budget
        self._states = ChoiceStates(engine, plans, pool, base, self._swap_lock)
        self._state = self._states.of(())
        # What the weights hold in fused mode; None while they are written, and after a write that was interrupted.
        self._in_weights: ComposedWeights | None = self._state.snapshot
        if not engine.fused:
            self._activate(self._state)

    @property
    @abstractmethod
    def adapters(self) -> Mapping[str, Adapter]:
        """Name -> adapter."""

    @contextlib.contextmanager
    def hold(self, adapters: ChoiceSpec = UNSET) -> Iterator[HeldChoice]:
        """Hold a choice of adapters for a block, as a request needs it that takes many calls.

        Every call with ``adapters=held`` computes with the adapters as they were when the block began. In live mode
        they may be swapped, trained and removed meanwhile; what a removed adapter takes is free when the last block
        ends that holds it. In fused mode the weights are held: swaps, removals and calls with other choices wait for
        the block's end, and those of its own thread are refused.

        Args:
            adapters: the choice; default: the active one.

        Raises:
            AdapterNotFound, ChoiceError: as for ``swap``.
            Unavailable: fused mode, and another choice than the active one.
        """
        if self.engine.fused and adapters is not UNSET and parse_choice(adapters, self.pool) != self.choice:
            raise Unavailable(
                "weights hold one choice of adapters at a time, and this one is not active",
                next_step="swap to it first, or compile with mode='live'",
            )
        chosen = UNSET if self.engine.fused else adapters
        # The state is taken in here; in fused mode the lock keeps it in the weights.
        with self._call_lock.reading() if self.engine.fused else contextlib.nullcontext():
            held = self.with_choice(chosen, HeldChoice)
            try:
                yield held
            finally:
                held.end()

    def new_row_bank(self, rows: int, graph: str = MAIN_GRAPH) -> RowBank:
        """Return places for the adapters of the rows of a running batch.

        Raises:
            Unavailable: the program keeps no cache, or takes one choice for all rows of a call.
            OverBudget: there is no room for the places.
        """
        base = self._states.of(())
        keeps = self.mode == "live" and self.engine.cache_spec(graph) is not None
        if not keeps or self.engine.why_apart(base.snapshot, graph):
            raise Unavailable(
                "this program keeps no adapters of a running batch's rows from call to call",
                next_step="compile with mode='live' for target='onnxruntime'",
            )
        return RowBank(self.engine, base, rows, graph, self.pool.budget)

    def prefetch(self, adapters: ChoiceSpec) -> concurrent.futures.Future[None]:
        """Read and prepare a choice of adapters in a thread, so that the first call with it does not wait.

        It is a hint: where the memory budget has no room, nothing is kept.

        Args:
            adapters: the choice.

        Returns:
            What ends when the adapters are ready; its ``result()`` raises what reading them raised.

        Raises:
            AdapterNotFound, ChoiceError: as for ``swap``.
        """
        choice = parse_choice(adapters, self.pool)
        return self._readers.submit(lambda: (self._states.of(choice), None)[1])

    @functools.cached_property
    def _readers(self) -> concurrent.futures.Executor:
        return concurrent.futures.ThreadPoolExecutor(1, "lorac-prefetch")

    def with_choice(self, adapters: ChoiceSpec | HeldChoice, work: Callable[[BoundProgram, ChoiceState], T]) -> T:
        """Run some work with one choice of adapters throughout; no swap comes in between.

        Args:
            adapters: the choice, or a held one; ``UNSET``: the active one.
            work: takes the engine's binding of the choice, and its state.
        """
        if isinstance(adapters, HeldChoice):
            return work(adapters.program_of(self.engine), adapters.state)
        if self.mode == "baked":
            if adapters is not UNSET and parse_choice(adapters, self.pool) != self.choice:
                self.refuse_baked()
            return work(self._state.bound or self.engine.written_program, self._state)
        if self.engine.fused:
            return self._with_written(adapters, work)
        training = self.engine.computes_terms
        state = self._state if adapters is UNSET else self._states.of(parse_choice(adapters, self.pool), stale=training)
        state = state if training else self._refresh(state)
        assert state.bound is not None
        return work(state.bound, state)

    def group_rows(
        self, adapters: Sequence[ChoiceSpec | HeldChoice], graph: str, *, together: bool = True
    ) -> list[RowGroup]:
        """Return the rows of a batch by the calls that compute them, in the order in which the rows come.

        Args:
            adapters: the choice of each row, which may be held.
            graph: which graph is called.
            together: whether rows of several choices may share a call.

        Raises:
            AdapterNotFound, ChoiceError: as for ``swap``.
        """
        together = together and self.mode == "live"
        chosen = [self._row_choice(spec) for spec in adapters]
        # Once for each choice: whether a state is stale takes a look at all of its tensors.
        states = {key: self._row_state(spec) for key, spec in dict(chosen).items()} if together else {}
        shared = {key for key, state in states.items() if not self.engine.why_apart(state.snapshot, graph)}
        groups: dict[Hashable, RowGroup] = {}
        for row, (key, choice) in enumerate(chosen):
            group = groups.setdefault("together" if key in shared else key, RowGroup(choice))
            group.rows.append(row)
            group.states += [states[key]] if together else []
        return list(groups.values())

    def run_grouped(
        self,
        adapters: Sequence[ChoiceSpec | HeldChoice],
        graph: str,
        run: Callable[[list[RowGroup]], T],
        *,
        together: bool = True,
    ) -> T:
        """Run the groups of rows of a batch; where a call shows that some cannot share it, they are grouped again.

        Args:
            adapters, graph, together: as for ``group_rows``.
            run: runs the groups; it has changed nothing where it raises ``RowsApart``.
        """
        while True:
            with contextlib.suppress(RowsApart):
                return run(self.group_rows(adapters, graph, together=together))

    def _row_choice(self, spec: ChoiceSpec | HeldChoice) -> tuple[Hashable, ChoiceSpec | HeldChoice]:
        """Return a key that rows of one choice have in common, however it is written, and the choice."""
        if isinstance(spec, HeldChoice):
            spec.program_of(self.engine)
            return id(spec.state), spec
        choice = parse_choice(spec, self.pool)
        return choice, dict(choice) or None

    def _row_state(self, spec: ChoiceSpec | HeldChoice) -> ChoiceState:
        if isinstance(spec, HeldChoice):
            return spec.state
        return self._states.of(parse_choice(spec, self.pool), stale=self.engine.computes_terms)

    def with_rows(self, group: RowGroup, work: Callable[[BoundProgram, ChoiceState], T]) -> T:
        """Run some work for rows of a group: with their choice, or with the choices of all of them in one call."""
        if not group.mixed:
            return self.with_choice(group.choice, work)
        return work(self._states.bind_rows(choose_places(group.states)), group.states[0])

    def _with_written(self, adapters: ChoiceSpec, work: Callable[[BoundProgram, ChoiceState], T]) -> T:
        if adapters is not UNSET:
            choice = parse_choice(adapters, self.pool)
            self._call_lock.refuse_within()
            with self._swap_lock:
                return self._call_lock.writing(lambda: self._with_written_for(choice, work))
        self._rewrite()
        with self._call_lock.reading():
            if self._holds_active():
                return work(self.engine.written_program, self._state)
        return self._with_written(adapters, work)

    def _with_written_for(self, choice: Choice, work: Callable[[BoundProgram, ChoiceState], T]) -> T:
        """Run some work with weights that are written for it alone; the caller keeps other calls away."""
        before, state = self._state.snapshot, self._states.of(choice)
        try:
            self._put(state.snapshot)
            return work(self.engine.written_program, state)
        finally:
            self._put(before)

    def _rewrite(self) -> None:
        """Write the active weights again if their adapters were trained since, or if a write was interrupted."""
        if self._holds_active() and (self.engine.computes_terms or not self._state.stale):
            return
        self._call_lock.refuse_within()
        with self._swap_lock:
            if not self._holds_active():
                self._restore(self._state)
            elif self._state.stale:
                self._write(self._state.choice)

    def _holds_active(self) -> bool:
        """Whether the weights hold the active choice, rather than that of a running call."""
        return self._in_weights is self._state.snapshot

    @property
    def choice(self) -> Choice:
        """The active choice in canonical form."""
        return self._state.choice

    @property
    def snapshot(self) -> ComposedWeights:
        """The active choice, composed at every site."""
        return self._state.snapshot

    @property
    def active(self) -> dict[str, float]:
        """Name -> strength of the active adapters."""
        return choice_strengths(self._state.choice)

    def swap(self, adapters: ChoiceSpec, *, settle: bool = False) -> SwapReport:
        """Activate a choice of adapters: a name, ``{name: strength}``, or None.

        Running calls end with the adapters they began with. A swap that fails changes nothing.

        Args:
            settle: fused mode in ONNX Runtime: also make the weights constants of the session again, and return when
                calls use these. Until then the bound weights serve.

        Raises:
            AdapterNotFound, ChoiceError: the choice names an unknown adapter or makes no sense.
            Unavailable: ``settle`` on a target or in a mode that binds no weights; in fused mode, from inside a call.
        """
        start = time.perf_counter()
        self.refuse_baked()
        self._call_lock.refuse_within()
        choice = parse_choice(adapters, self.pool)
        with self._swap_lock:
            before = self._state
            unchanged = choice == before.choice and not before.stale
            written, blocked = self._write(choice) if self.engine.fused else (self._bind(choice), 0.0)
            changed = self._state
            touched = set() if unchanged else before.snapshot.composed.keys() | changed.snapshot.composed.keys()
        try:
            self._settle(settle)
        except BaseException:
            with self._swap_lock:
                self._restore(before if self._state is changed else self._state)
            raise
        state = "settled" if self.engine.is_settled else "bound"
        return SwapReport(state, len(touched), written, time.perf_counter() - start, blocked)

    def _settle(self, now: bool) -> None:
        if now:
            self.engine.settle()
        elif self.engine.settles_in_background:
            threading.Thread(target=self.engine.settle, name="lorac-settle", daemon=True).start()

    def _bind(self, choice: Choice) -> int:
        before, state = self._state, self._states.of(choice)
        self._activate(state)
        return 0 if state is before else state.nbytes

    def _activate(self, state: ChoiceState) -> None:
        before = self._state
        assert state.bound is not None
        assert before.bound is not None
        try:
            state.bound.activate()
            self._state = state
        except BaseException:
            self._state = before
            before.bound.activate()
            raise

    def _write(self, choice: Choice) -> tuple[int, float]:
        cached = self._states.of(choice)
        # A snapshot of its own per swap, so that weights settled for an earlier swap do not serve this one unasked.
        state = replace(cached, snapshot=replace(cached.snapshot))
        start = time.perf_counter()
        written = self._call_lock.writing(lambda: self._exchange(state))
        return written, time.perf_counter() - start

    def _exchange(self, state: ChoiceState) -> int:
        """Write a state into the weights and make it the active one, both or neither; the caller keeps calls away."""
        before = self._state
        try:
            written = self._put(state.snapshot)
            self._state = state
        except BaseException:
            self._state = before
            self._put(before.snapshot)
            raise
        return written

    def _put(self, snapshot: ComposedWeights) -> int:
        """Write a snapshot into the weights; after an interruption they hold none, and the next call writes again."""
        self._in_weights = None
        written = self.engine.write(snapshot)
        self._in_weights = snapshot
        return written

    def _restore(self, state: ChoiceState) -> None:
        """Make an earlier state the active one again, even if its adapters were removed."""
        if not self.engine.fused:
            self._activate(state)
        elif self._in_weights is not state.snapshot or self._state is not state:
            self._call_lock.writing(lambda: self._exchange(state))

    def _refresh(self, state: ChoiceState) -> ChoiceState:
        """Return the state, made again if its adapters were trained since."""
        if not state.stale:
            return state
        with self._swap_lock:
            renewed = self._states.of(state.choice)
            if state is self._state:
                self._activate(renewed)
        return renewed

    def record_baked(self, choice: Choice) -> None:
        """Record the choice that a baked engine holds."""
        self._state = self._states.new(choice)

    def refuse_baked(self) -> None:
        """Raise ``Unavailable`` if the adapters are constants of the program."""
        if self.mode == "baked":
            raise Unavailable(
                "the adapters of a baked model are constants and cannot be changed",
                next_step="compile with mode='live' or 'fused' to swap",
            )
