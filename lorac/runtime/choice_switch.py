"""The switch between adapters of a running engine: for one call, for a block of calls, or until the next swap."""

import concurrent.futures
import contextlib
import functools
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from lorac.adapters.pool import AdapterPool
from lorac.errors import ChoiceError, Unavailable
from lorac.frontend.components import MAIN_GRAPH
from lorac.ir.sites.site import BaseReader
from lorac.ir.slots.choice import AS_TRAINED, UNSET, Choice, ChoiceSpec, describe_choice, parse_choice
from lorac.ir.slots.composition import ComposedWeights
from lorac.ir.slots.places import choose_places
from lorac.ir.slots.plans import PreparedAdapter, SitePlan
from lorac.runtime.choice_states import ChoiceState, ChoiceStates
from lorac.runtime.invocation import InvokedProgram
from lorac.runtime.locks import ReadWriteLock
from lorac.runtime.row_bank import RowBank
from lorac.target.engine import BoundProgram, Engine, RowsApart
from lorac.variants.adapter import Adapter

T = TypeVar("T")


class HeldChoice:
    """A choice of adapters that ``compiled.hold`` yields and that calls take as ``adapters=``.

    Args:
        program: the engine's program with the choice.
        state: the choice.
    """

    def __init__(self, program: BoundProgram, state: ChoiceState) -> None:
        self._program: BoundProgram | None = program
        self._state: ChoiceState | None = state
        self.choice: Choice = state.choice

    @property
    def state(self) -> ChoiceState:
        """The state of the choice.

        Raises:
            ChoiceError: the ``hold`` block has ended.
        """
        if self._state is None:
            raise ChoiceError("the block that held this choice has ended", next_step="hold it anew: compiled.hold(...)")
        return self._state

    def program_of(self, engine: Engine) -> BoundProgram:
        """Return the engine's program with the choice.

        Raises:
            ChoiceError: the ``hold`` block has ended, or the choice is another model's.
        """
        state = self.state
        assert self._program is not None
        if self._program.engine is not engine:
            raise ChoiceError(
                f"the choice {describe_choice(state.choice)} is held by another model",
                next_step="hold one of this model's adapters",
            )
        return self._program

    def end(self) -> None:
        """Release the adapters; their memory is freed when no other reference to it is left."""
        self._program = self._state = None

    def __repr__(self) -> str:
        return f"<held choice of {', '.join(name for name, _ in self.choice) or 'no adapters'}>"


@dataclass(eq=False)
class RowGroup:
    """The rows of a batch that one call computes, with one choice of adapters or one choice per row.

    Attributes:
        choice: the choice of the first row.
        rows: indices of the rows, in the order of the batch.
        states: the state of each row, where rows of several choices may share a call; else empty.
    """

    choice: ChoiceSpec | HeldChoice
    rows: list[int] = field(default_factory=list)
    states: list[ChoiceState] = field(default_factory=list)

    @property
    def mixed(self) -> bool:
        """Whether the rows have several choices."""
        return any(state is not self.states[0] for state in self.states)


@dataclass(frozen=True)
class SwapReport:
    """The cost of one swap.

    Attributes:
        state: weight state afterwards: ``"bound"`` (weights are inputs) or ``"settled"`` (weights are constants again).
        sites: number of sites whose slots changed.
        bytes: bytes that were written or newly bound.
        seconds: wall time of the whole swap.
        blocked_seconds: how long calls had to wait; 0 in live mode.
    """

    state: str
    sites: int
    bytes: int
    seconds: float
    blocked_seconds: float = 0.0


class ChoiceSwitch:
    """The choice of adapters of a compiled model. Every method may be called from any thread.

    Args:
        engine: runs the program.
        plans: the slots of every touched site.
        base: reads base weights.
        mode: ``"live"``, ``"fused"`` or ``"baked"``.

    Attributes:
        state: the active choice.
        states: caches the states of choices.
        lock: held while the active choice or the pool changes.
    """

    def __init__(
        self, engine: Engine, plans: Mapping[str, SitePlan], pool: AdapterPool, base: BaseReader, mode: str
    ) -> None:
        self.engine, self.pool, self.mode = engine, pool, mode
        self.lock, self._call_lock = threading.RLock(), ReadWriteLock()
        engine.memory_budget = pool.budget
        self.states = ChoiceStates(engine, plans, pool, base, self.lock)
        self.state = self.states.of(())
        # The choice merged into the weights in fused mode; None during a write, and after an interrupted write.
        self._in_weights: ComposedWeights | None = self.state.snapshot
        if not engine.fused:
            self._activate(self.state)

    @property
    def choice(self) -> Choice:
        """The active choice in canonical form."""
        return self.state.choice

    @property
    def prepared_adapters(self) -> dict[str, PreparedAdapter]:
        """Name -> prepared adapter, for the adapters in memory and the adapters of the active choice."""
        names = dict.fromkeys((*self.pool.adapters, *dict(self.choice)))
        return {name: self.pool[name] for name in names if name in self.pool}

    # ── Until the next swap ──────────────────────────────────────────────────────────────────────────────────────────
    def swap(self, adapters: ChoiceSpec, *, settle: bool = False) -> SwapReport:
        """Activate a choice of adapters (``Compiled.swap``); an error leaves the earlier choice active."""
        start = time.perf_counter()
        self.refuse_change()
        choice = parse_choice(adapters, self.pool)
        with self.lock:
            state = self.states.of(choice)  # first: the traceback of an error would keep ``before`` alive
            before, blocked = self.state, 0.0
            unchanged = choice == before.choice and self._is_current(before)
            if self.engine.fused:
                written, blocked = self._write(state)
            else:
                self._activate(state)
                written = 0 if state is before else state.nbytes
            changed = self.state
            touched = set() if unchanged else before.snapshot.composed.keys() | changed.snapshot.composed.keys()
        try:
            if settle:
                self.engine.settle()
            elif self.engine.settles_in_background:
                threading.Thread(target=self.engine.settle, name="lorac-settle", daemon=True).start()
        except BaseException:
            with self.lock:
                self.restore(before if self.state is changed else self.state)
            raise
        weights = "settled" if self.engine.is_settled else "bound"
        return SwapReport(weights, len(touched), written, time.perf_counter() - start, blocked)

    def restore(self, state: ChoiceState) -> None:
        """Activate an earlier state again, even if its adapters were removed; the caller holds the lock."""
        if not self.engine.fused:
            self._activate(state)
        elif self._in_weights is not state.snapshot or self.state is not state:
            self._call_lock.writing(lambda: self._exchange(state))

    def _activate(self, state: ChoiceState) -> None:
        """Bind a state and make it the active state; an error leaves the earlier state bound."""
        before = self.state
        assert state.bound is not None
        assert before.bound is not None
        try:
            state.bound.activate()
            self.state = state
        except BaseException:
            self.state = before
            before.bound.activate()
            raise

    def _write(self, cached: ChoiceState) -> tuple[int, float]:
        """Write a state into the weights once running calls have ended; return bytes written and seconds blocked."""
        # A new snapshot per swap, so that weights settled for an earlier swap are not used for this swap unasked.
        state = replace(cached, snapshot=replace(cached.snapshot), original=cached)
        start = time.perf_counter()
        written = self._call_lock.writing(lambda: self._exchange(state))
        return written, time.perf_counter() - start

    def _exchange(self, state: ChoiceState) -> int:
        """Write a state into the weights and make it active, or restore the earlier; the caller blocks other calls."""
        before = self.state
        try:
            written = self._put(state.snapshot)
            self.state = state
        except BaseException:
            self.state = before
            self._put(before.snapshot)
            raise
        return written

    def _put(self, snapshot: ComposedWeights) -> int:
        """Write a snapshot into the weights; after an interrupted write the next call writes the active one again."""
        self._in_weights = None
        written = self.engine.write(snapshot)
        self._in_weights = snapshot
        return written

    def record_baked(self, choice: Choice) -> None:
        """Record the choice that is baked into the engine."""
        self.state = self.states.new(choice)

    def refuse_change(self) -> None:
        """Raise ``Unavailable`` where adapters are constants, or while a call of this thread reads the weights."""
        self.refuse_baked()
        self._call_lock.refuse_within()

    def refuse_baked(self) -> None:
        """Raise ``Unavailable`` if the adapters are constants of the program."""
        if self.mode == "baked":
            raise Unavailable(
                "the adapters of a baked model are constants and cannot be changed",
                next_step="compile with mode='live' or 'fused' to swap",
            )

    # ── Adapters that come and go ────────────────────────────────────────────────────────────────────────────────────
    def add(self, adapter: Adapter, prepared: PreparedAdapter) -> None:
        """Add an adapter that fits the plans, and compute its state; the caller holds the lock."""
        self.pool.add(adapter, prepared)
        if not self.engine.fused:
            self.states.of(((adapter.name, AS_TRAINED),))

    def remove(self, name: str) -> None:
        """Take an adapter out of the active choice and remove it; the caller holds the lock."""
        if name in dict(self.choice):
            self.swap({other: active for other, active in self.choice if other != name})
        self.pool.remove(name)
        self.states.forget(name)

    def rebind(self) -> None:
        """Compute and bind the choice again, since the dtype or device of the model's tensors changed."""
        with self.lock:
            self.pool.invalidate()
            self.states.clear()
            if self.mode == "live":
                self._activate(self.states.of(self.choice))

    def _is_current(self, state: ChoiceState) -> bool:
        """Return whether no tensor of a state's adapters was written or replaced since the state was computed."""
        return self.pool.has_versions(state.entries, state.versions)

    def refresh(self, state: ChoiceState) -> ChoiceState:
        """Return a state, computed again if its adapters were trained since."""
        if self._is_current(state):
            return state
        with self.lock:
            renewed = self.states.of(state.choice)
            if state is self.state:
                self._activate(renewed)
        return renewed

    # ── For a call, or a block of calls ──────────────────────────────────────────────────────────────────────────────
    @contextlib.contextmanager
    def hold(self, adapters: ChoiceSpec = UNSET) -> Iterator[HeldChoice]:
        """Hold a choice of adapters for a block (``Compiled.hold``)."""
        if self.engine.fused and adapters is not UNSET and parse_choice(adapters, self.pool) != self.choice:
            raise Unavailable(
                "weights hold one choice of adapters at a time, and this one is not active",
                next_step="swap to it first, or compile with mode='live'",
            )
        chosen = UNSET if self.engine.fused else adapters
        # ``HeldChoice`` references the state; in fused mode the lock keeps it in the weights.
        with self._call_lock.reading() if self.engine.fused else contextlib.nullcontext():
            held = self.with_choice(chosen, HeldChoice)
            try:
                yield held
            finally:
                held.end()

    def prefetch(self, adapters: ChoiceSpec) -> concurrent.futures.Future[None]:
        """Read and prepare a choice of adapters in a thread (``Compiled.prefetch``)."""
        choice = parse_choice(adapters, self.pool)
        return self._readers.submit(lambda: (self.states.of(choice), None)[1])

    @functools.cached_property
    def _readers(self) -> concurrent.futures.Executor:
        return concurrent.futures.ThreadPoolExecutor(1, "lorac-prefetch")

    def with_choice(self, adapters: ChoiceSpec | HeldChoice, work: Callable[[BoundProgram, ChoiceState], T]) -> T:
        """Call ``work`` with one choice of adapters; a swap meanwhile does not affect it.

        Args:
            adapters: the choice, or a ``HeldChoice``; ``UNSET``: the active choice.
            work: called with the engine's program for the choice, and the choice's state.
        """
        if isinstance(adapters, HeldChoice):
            return work(self._at_prompts(adapters.program_of(self.engine), [adapters.state]), adapters.state)
        if self.mode == "baked":
            if adapters is not UNSET and parse_choice(adapters, self.pool) != self.choice:
                self.refuse_baked()
            return work(self.state.bound or self.engine.written_program, self.state)
        if self.engine.fused:
            return self._with_written(adapters, work)
        training = self.engine.computes_terms
        state = self.state if adapters is UNSET else self.states.of(parse_choice(adapters, self.pool), stale=training)
        state = state if training else self.refresh(state)
        assert state.bound is not None
        return work(self._at_prompts(state.bound, [state]), state)

    def _at_prompts(self, bound: BoundProgram, rows: Sequence[ChoiceState]) -> BoundProgram:
        """Return the program of rows; it looks for invocation tokens in prompts where an adapter has them."""
        if self.engine.finds_invocations or not any(state.snapshot.invocations for state in rows):
            return bound
        return InvokedProgram(self.engine, self.states, rows)

    def _with_written(self, adapters: ChoiceSpec, work: Callable[[BoundProgram, ChoiceState], T]) -> T:
        if adapters is UNSET:
            while True:
                current = self.engine.computes_terms or self._is_current(self.state)
                if not (self._holds_active and current):  # its adapters were trained, or a write was interrupted
                    self._call_lock.refuse_within()
                    with self.lock:
                        if not self._holds_active:
                            self.restore(self.state)
                        elif not self._is_current(self.state):
                            self._write(self.states.of(self.state.choice))
                with self._call_lock.reading():
                    if self._holds_active:
                        return work(self.engine.written_program, self.state)
        choice = parse_choice(adapters, self.pool)

        def run() -> T:
            """Write the choice into the weights, run the work, restore the weights; other calls wait meanwhile."""
            before, state = self.state.snapshot, self.states.of(choice)
            try:
                self._put(state.snapshot)
                return work(self.engine.written_program, state)
            finally:
                self._put(before)

        self._call_lock.refuse_within()
        with self.lock:
            return self._call_lock.writing(run)

    @property
    def _holds_active(self) -> bool:
        """Whether the active choice is in the weights, rather than the choice of a running call."""
        return self._in_weights is self.state.snapshot

    # ── For each row of a batch ──────────────────────────────────────────────────────────────────────────────────────
    def run_grouped(
        self,
        adapters: Sequence[ChoiceSpec | HeldChoice],
        graph: str,
        run: Callable[[list[RowGroup]], T],
        *,
        together: bool = True,
    ) -> T:
        """Run a batch in groups of rows; where ``run`` raises ``RowsApart``, group the rows again.

        Args:
            adapters: the choice of each row, or its ``HeldChoice``.
            graph: the name of the graph to call.
            run: runs the groups; where it raises ``RowsApart`` it must have changed nothing.
            together: whether rows of several choices may share a call.

        Raises:
            AdapterNotFound, ChoiceError: as for ``swap``.
        """
        while True:
            with contextlib.suppress(RowsApart):
                return run(self._group_rows(adapters, graph, together=together and self.mode == "live"))

    def _group_rows(self, adapters: Sequence[ChoiceSpec | HeldChoice], graph: str, *, together: bool) -> list[RowGroup]:
        """Group the rows by the call that computes them, in the order of each group's first row."""
        training, groups = self.engine.computes_terms, dict[Hashable, RowGroup]()
        states, shared = dict[Hashable, ChoiceState](), set[Hashable]()
        for row, spec in enumerate(adapters):
            choice: ChoiceSpec | HeldChoice = spec
            if isinstance(spec, HeldChoice):
                spec.program_of(self.engine)
                key: Hashable = id(spec.state)
            else:
                parsed = key = parse_choice(spec, self.pool)
                choice = dict(parsed) or None
            # Once for each choice: the check whether a state is stale reads the versions of all its tensors.
            if together and key not in states:
                states[key] = spec.state if isinstance(spec, HeldChoice) else self.states.of(parsed, stale=training)
                if not self.engine.why_apart(states[key].snapshot, graph):
                    shared.add(key)
            group = groups.setdefault("together" if key in shared else key, RowGroup(choice))
            group.rows.append(row)
            if together:
                group.states.append(states[key])
        return list(groups.values())

    def with_rows(self, group: RowGroup, work: Callable[[BoundProgram, ChoiceState], T]) -> T:
        """Call ``work`` for a group of rows: with its one choice, or with the choice of each row in one call."""
        if not group.mixed:
            return self.with_choice(group.choice, work)
        places = choose_places(group.states)
        bound = self._at_prompts(self.states.bind_rows(places), group.states)
        if any(state.snapshot.prefix is not None for state in places):
            bound = replace(bound, parts=tuple(state.bound for state in places if state.bound is not None))
        return work(bound, group.states[0])

    def new_row_bank(self, rows: int, graph: str = MAIN_GRAPH) -> RowBank:
        """Allocate places for the adapters of a running batch, one per row.

        Raises:
            Unavailable: the program has no cache, or takes one choice for all rows of a call.
            OverBudget: the memory budget has no room for the places.
        """
        base = self.states.of(())
        keeps = self.mode == "live" and self.engine.cache_spec(graph) is not None
        if not keeps or self.engine.why_apart(base.snapshot, graph):
            raise Unavailable(
                "this program cannot keep the adapters of a running batch from call to call",
                next_step="compile with mode='live' for target='onnxruntime'",
            )
        return RowBank(self.engine, base, rows, graph, self.pool.budget)
