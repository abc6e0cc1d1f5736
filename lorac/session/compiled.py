"""``Compiled``: a model and its adapters, ready to call; swaps, adds, removes and explains."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lorac.errors import BaseNeeded, Unavailable
from lorac.frontend.components import MAIN_GRAPH, check_component
from lorac.ir.sites import BaseReader, Site
from lorac.ir.slots.choice import UNSET, Active, Choice, ChoiceSpec, choice_strengths, parse_choice
from lorac.ir.slots.composition import ComposedWeights
from lorac.ir.slots.plans import PreparedAdapter, SitePlan
from lorac.runtime.adapter_pool import AdapterPool
from lorac.runtime.batching import run_rows
from lorac.runtime.capacity import check_capacity
from lorac.runtime.choice_states import ChoiceState, ChoiceStates
from lorac.runtime.generation.text_generator import TextGenerator
from lorac.runtime.locks import ReadWriteLock
from lorac.runtime.services import Services
from lorac.runtime.traits import Component
from lorac.session.presentation import SwapReport, add_presentation
from lorac.target.binding import BoundProgram, CallResult
from lorac.target.engine import Engine

T = TypeVar("T")


@add_presentation
class Compiled(TextGenerator):
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
        pool: AdapterPool,
        services: Services,
        mode: str,
    ) -> None:
        """Put the parts together (the compiler's business)."""
        self.engine, self.plans, self.sites, self.base = engine, plans, sites, base
        self.pool, self.services, self.mode = pool, services, mode
        self._swaps, self._adding = threading.RLock(), threading.Lock()
        self._calls = ReadWriteLock()
        self._answered = threading.local()
        self._states = ChoiceStates(engine, plans, pool, base, self._swaps)
        self._state = self._states.of(())
        # What the weights hold in fused mode; None while they are written, and after a write that was interrupted.
        self._held: ComposedWeights | None = self._state.snapshot
        if not engine.fused:
            self._activate(self._state)

    # --- calling -----------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, adapters: Any = UNSET, **kwargs: Any) -> Any:
        """Answer as the model does: its own output type; torch or numpy as it came."""
        return self.call(args, kwargs, adapters)

    def __getitem__(self, name: str) -> Component:
        """One of several models compiled together, called as it is; raises ``ChoiceError`` where there is none."""
        known = self.services.traits
        return Component(self, check_component(name, known), known[name])

    def call(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], adapters: Any = UNSET, *, graph: str = MAIN_GRAPH
    ) -> Any:
        """One call of a graph, with the active adapters or with a choice of its own."""
        if isinstance(adapters, Sequence) and not isinstance(adapters, str):
            return self._call_rows(args, kwargs, adapters, graph)
        return self.with_choice(adapters, lambda bound, _: self._run(bound, graph, args, kwargs))

    def _run(self, bound: BoundProgram, graph: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        args, kwargs = self.services.fit((args, kwargs))
        answer = bound.run(graph, args, kwargs)
        self._answered.aux = answer.aux
        return answer.output

    def with_choice(self, adapters: Any, work: Callable[[BoundProgram, ChoiceState], T]) -> T:
        """Some work with the active adapters, or with a choice of its own, as one call: no swap comes in between."""
        if self.mode == "baked":
            if adapters is not UNSET and parse_choice(adapters, self.pool) != self.choice:
                self.refuse_baked()
            return work(self._state.bound or self.engine.written, self._state)
        if self.engine.fused:
            return self._with_written(adapters, work)
        computed = self.computes_terms()
        state = self._state if adapters is UNSET else self._states.of(parse_choice(adapters, self.pool), stale=computed)
        state = state if computed else self._fresh(state)
        assert state.bound is not None
        return work(state.bound, state)

    def _with_written(self, adapters: Any, work: Callable[[BoundProgram, ChoiceState], T]) -> T:
        if adapters is not UNSET:
            choice = parse_choice(adapters, self.pool)
            with self._swaps:
                return self._calls.writing(lambda: self._with_own(choice, work))
        self._rewrite()
        with self._calls.reading():
            if self._whole():
                return work(self.engine.written, self._state)
        return self._with_written(adapters, work)

    def _with_own(self, choice: Choice, work: Callable[[BoundProgram, ChoiceState], T]) -> T:
        """Some work with weights written for it, by one who is alone."""
        before, state = self._state.snapshot, self._states.of(choice)
        try:
            self._put(state.snapshot)
            return work(self.engine.written, state)
        finally:
            self._put(before)

    def _rewrite(self) -> None:
        """Write the active weights anew where their adapters were trained since, or a write was interrupted."""
        if self._whole() and (self.computes_terms() or not self._state.stale):
            return
        with self._swaps:
            if not self._whole():
                self._restore(self._state)
            elif self._state.stale:
                self._write(self._state.choice)

    def _whole(self) -> bool:
        """Whether the weights hold the active choice; a call of its own choice that is running changes that."""
        return self._held is self._state.snapshot

    def _call_rows(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], adapters: Sequence[ChoiceSpec], graph: str
    ) -> Any:
        def run(own: tuple[Any, ...], named: dict[str, Any], choice: ChoiceSpec) -> CallResult:
            return CallResult(self.call(own, named, choice, graph=graph), self.aux)

        # In their canonical spelling, so that rows of one choice run together however it was written.
        answer = run_rows(run, args, kwargs, [dict(parse_choice(choice, self.pool)) or None for choice in adapters])
        self._answered.aux = answer.aux
        return answer.output

    # --- swapping ----------------------------------------------------------------------------------------------

    @property
    def choice(self) -> Choice:
        """What is active, in its canonical spelling."""
        return self._state.choice

    @property
    def snapshot(self) -> ComposedWeights:
        """What is active, and what it comes to at every site."""
        return self._state.snapshot

    @property
    def active(self) -> dict[str, float]:
        """Name -> strength of what is active."""
        return choice_strengths(self._state.choice)

    def swap(self, adapters: ChoiceSpec, *, settle: bool = False) -> SwapReport:
        """Make a choice the active one: a name, ``{name: strength}``, or None.

        Running calls end with the adapters they began with. A swap that fails changes nothing.

        Args:
            adapters: the choice.
            settle: fused mode in ONNX Runtime: also re-bake the weights as constants, and return when calls run on
                them. Until then the bound weights serve.

        Raises:
            AdapterNotFound, ChoiceError: what is asked for does not exist or makes no sense.
            Unavailable: settling was asked of a target or mode that binds no weights.
        """
        begun = time.perf_counter()
        self.refuse_baked()
        choice = parse_choice(adapters, self.pool)
        with self._swaps:
            touched, before = self._states.touched(self._state, choice), self._state
            written, blocked = self._write(choice) if self.engine.fused else (self._bind(choice), 0.0)
            changed = self._state
        try:
            self._settle(settle)
        except BaseException:
            with self._swaps:
                self._restore(before if self._state is changed else self._state)
            raise
        state = "settled" if self.engine.settled else "bound"
        return SwapReport(state, len(touched), written, time.perf_counter() - begun, blocked)

    def _settle(self, now: bool) -> None:
        if now:
            self.engine.settle()
        elif self.engine.settles_alone:
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
        # A snapshot of its own per swap: what settled for an earlier one does not serve this one unasked.
        state = dataclasses.replace(cached, snapshot=dataclasses.replace(cached.snapshot))
        begun = time.perf_counter()
        written = self._calls.writing(lambda: self._exchange(state))
        return written, time.perf_counter() - begun

    def _exchange(self, state: ChoiceState) -> int:
        """Make the weights hold a state and make it the active one, by one who is alone; both or none."""
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
        """Make the weights hold a snapshot. Where that is interrupted they hold nothing, and the next call puts."""
        self._held = None
        written = self.engine.write(snapshot)
        self._held = snapshot
        return written

    def _restore(self, state: ChoiceState) -> None:
        """Make a state that was the active one that again, whether or not its adapters are still there."""
        if not self.engine.fused:
            self._activate(state)
        elif self._held is not state.snapshot or self._state is not state:
            self._calls.writing(lambda: self._exchange(state))

    def _fresh(self, state: ChoiceState) -> ChoiceState:
        """The state, made anew where its adapters were trained since."""
        if not state.stale:
            return state
        with self._swaps:
            renewed = self._states.of(state.choice)
            if state is self._state:
                self._activate(renewed)
        return renewed

    # --- adding and removing -----------------------------------------------------------------------------------

    @property
    def adapters(self) -> dict[str, Any]:
        """Name -> adapter."""
        return self.pool.adapters

    def add_adapter(self, source: Any, name: str | None = None) -> str:
        """Register an adapter at run time, without a rebuild; returns its name. One that fails leaves no trace.

        Args:
            source: a path, an Adapter, a fresh Variant, or a configuration of PEFT's.
            name: its name; default: the folder's, the adapter's own, or the variant's.

        Raises:
            NeedsRecompile: more sites, rank or kinds of slots than were reserved; nothing was registered.
            CompileError: it needs a merged weight where the weight is quantised; nothing was registered.
            AdapterError: the name is taken.
        """
        self.refuse_baked()
        with self._adding:
            adapter = self.services.load(source, name)
            prepared = self._prepared(adapter)
            check_capacity(adapter.name, prepared, self.plans, self.sites)
            self._all_or_nothing(lambda: self._add(adapter, prepared))
        return str(adapter.name)

    def _add(self, adapter: Any, prepared: PreparedAdapter) -> None:
        self.pool.put(adapter, prepared)
        self.registered()
        if not self.engine.fused:
            self._states.of(((adapter.name, Active()),))

    def _all_or_nothing(self, change: Callable[[], None]) -> None:
        """Change which adapters there are; where that fails or is interrupted, everything is as before."""
        with self._swaps:
            state, entries, kept = self._state, self.pool.entries, dict(self._states.kept)
            try:
                change()
            except BaseException:
                self.pool.entries, self._states.kept = entries, kept
                self._restore(state)
                self.registered()
                raise

    def _prepared(self, adapter: Any) -> PreparedAdapter:
        try:
            return self.pool.prepare(adapter)
        except BaseNeeded:  # a base weight is kept where a site has slots, and the lack of those says more
            check_capacity(adapter.name, self.services.outline(adapter), self.plans, self.sites)
            raise

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter, and take it out of the active choice; where that fails, it is there as before."""
        self.refuse_baked()
        self._all_or_nothing(lambda: self._remove(name))

    def _remove(self, name: str) -> None:
        remaining = {n: how for n, how in self._state.choice if n != name}
        if len(remaining) != len(self._state.choice):
            self.swap(remaining)
        self.pool.drop(name)
        self._states.forget(name)
        self.registered()

    def renew(self) -> None:
        """Make everything anew that was made of tensors that are other ones now: of another dtype, or elsewhere."""
        with self._swaps:
            self.pool.forget_prepared()
            self._states.clear()
            if self.mode == "live":
                self._activate(self._states.of(self._state.choice))

    def mark_baked(self, choice: Choice) -> None:
        """Record what a baked engine holds (the compiler's business)."""
        self._state = self._states.new(choice)

    def refuse_baked(self) -> None:
        """Raise ``Unavailable`` where the adapters are constants of the program."""
        if self.mode == "baked":
            raise Unavailable(
                "the adapters of a baked model are constants and cannot be changed",
                next_step="compile with mode='live' or 'fused' to swap",
            )

    def computes_terms(self) -> bool:
        """Hook: whether a call made now reads the adapters' own tensors and no slot (eager, in training)."""
        return False

    def registered(self) -> None:
        """Hook: adapters came or went (eager has the parameters of those that there are)."""

    # --- the rest of the interface -------------------------------------------------------------------------------

    @property
    def aux(self) -> Mapping[str, Mapping[str, Any]]:
        """Extra outputs asked for with ``aux=``, of this thread's last call: name -> site path -> tensor."""
        return getattr(self._answered, "aux", {})

    @property
    def graph(self) -> Any:
        """Name -> graph, to print, compare and draw. Target eager captures its host now, in eval mode."""
        from lorac.report.graph_views import collect_graphs

        return collect_graphs(self)

    def explain(self, target: str | None = None) -> Any:
        """Per site: what was done with each term, why nothing cheaper; and of another target, which ops it lacks."""
        return self.services.explain(self, target)

    def export(self, target: str = "onnxruntime", mode: str = "auto", **options: Any) -> Any:
        """Compile again from the host model, with the adapters as they now are."""
        return self.services.recompile(self, target=target, mode=mode, **options)

    def save_choice(self, path: Any, adapters: ChoiceSpec, component: str = MAIN_GRAPH) -> None:
        """Write a choice as one file, for whoever runs the saved program without lorac: an ``.onnx_adapter``.

        ``save`` writes one for each adapter; this is the way to one for a mixture, or for an adapter that came later.

        Raises:
            AdapterNotFound, ChoiceError, NeedsRecompile: as ``swap``; there is no such component.
            Unavailable: the target has no such files, or the choice does not fit into one.
        """
        self.refuse_baked()
        with self._swaps:
            self._states.save(parse_choice(adapters, self.pool), component, Path(path))

    def save(self, folder: Any, tokenizer: Any = None) -> None:
        """Write everything needed to run this elsewhere to ``folder``: ``lorac.load(folder)`` gives it back.

        It takes the place of an older artefact in one step; nothing that lorac did not write is ever removed.

        Args:
            folder: where.
            tokenizer: saved beside it; default: ``compiled.tokenizer``, where there is one.

        Raises:
            ArtifactError: the folder holds something else, or besides an older artefact files of others.
        """
        with self._swaps:
            self.services.save(self, folder, self.written_tokenizer(tokenizer))
