"""An engine whose adapters can be switched, added and removed while it runs."""

from __future__ import annotations

import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree

from lorac.adapters.pool import AdapterPool
from lorac.errors import Unavailable
from lorac.frontend.components import MAIN_GRAPH
from lorac.ir.sites import BaseReader
from lorac.ir.slots.choice import UNSET, Active, Choice, ChoiceSpec, choice_strengths, parse_choice
from lorac.ir.slots.composition import ComposedWeights
from lorac.ir.slots.plans import PreparedAdapter, SitePlan
from lorac.runtime.batching import run_rows
from lorac.runtime.choice_states import ChoiceState, ChoiceStates
from lorac.runtime.generation.prompt_cache import PromptCache
from lorac.runtime.generation.tokenizers import TokenizerFiles
from lorac.runtime.locks import ReadWriteLock
from lorac.runtime.traits import ModelTraits
from lorac.target.engine import BoundProgram, CallResult, Engine
from lorac.variants.adapter import Adapter

T = TypeVar("T")


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


class SwitchableModel(ABC):
    """An engine together with its adapters. Every method may be called from any thread.

    Args:
        engine: runs the program.
        plans: the slots of every touched site.
        base: reads base weights.
        mode: ``"live"``, ``"fused"`` or ``"baked"``.
        traits: graph name -> configuration, dtype and device of its model.
        input_dtypes: dtype of the original model -> dtype in which it was compiled, for inputs of calls.
    """

    def __init__(
        self,
        engine: Engine,
        plans: Mapping[str, SitePlan],
        pool: AdapterPool,
        base: BaseReader,
        mode: str,
        traits: Mapping[str, ModelTraits],
        input_dtypes: Mapping[torch.dtype, torch.dtype],
    ) -> None:
        self.engine, self.plans, self.pool, self.base = engine, plans, pool, base
        self.mode, self.traits, self.input_dtypes = mode, traits, input_dtypes
        self._swap_lock, self._call_lock = threading.RLock(), ReadWriteLock()
        self._last_call = threading.local()
        self._tokenizer: Any = None
        self.prompt_caches = weakref.WeakValueDictionary[int, PromptCache]()
        self._states = ChoiceStates(engine, plans, pool, base, self._swap_lock)
        self._state = self._states.of(())
        # What the weights hold in fused mode; None while they are written, and after a write that was interrupted.
        self._in_weights: ComposedWeights | None = self._state.snapshot
        if not engine.fused:
            self._activate(self._state)

    @abstractmethod
    def _on_adapters_changed(self) -> None:
        """React to adapters that were added or removed."""

    def call(
        self,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        adapters: ChoiceSpec | Sequence[ChoiceSpec] = UNSET,
        *,
        graph: str = MAIN_GRAPH,
    ) -> Any:
        """Run a graph once, with the active adapters or with a choice for this call, or one for each row."""
        if isinstance(adapters, Sequence) and not isinstance(adapters, str):
            return self._call_rows(args, kwargs, adapters, graph)
        return self.with_choice(adapters, lambda bound, _: self._run(bound, graph, args, kwargs))

    def _run(self, bound: BoundProgram, graph: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        args, kwargs = self.cast_inputs((args, kwargs))
        result = bound.run(graph, args, kwargs)
        self._last_call.aux = result.aux
        return result.output

    def cast_inputs(self, inputs: T) -> T:
        """Return inputs with every tensor in the original model's dtype cast to the dtype of the compiled model."""
        if not self.input_dtypes:
            return inputs

        def cast(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(self.input_dtypes.get(tensor.dtype, tensor.dtype))

        result: T = pytree.tree_map_only(torch.Tensor, cast, inputs)
        return result

    def with_choice(self, adapters: ChoiceSpec, work: Callable[[BoundProgram, ChoiceState], T]) -> T:
        """Run some work with one choice of adapters throughout; no swap comes in between.

        Args:
            adapters: the choice; ``UNSET``: the active one.
            work: takes the engine's binding of the choice, and its state.
        """
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

    def _call_rows(
        self, args: tuple[object, ...], kwargs: Mapping[str, object], adapters: Sequence[ChoiceSpec], graph: str
    ) -> object:
        def run(args: tuple[object, ...], kwargs: dict[str, object], choice: ChoiceSpec) -> CallResult:
            return CallResult(self.call(args, kwargs, choice, graph=graph), self.aux)

        # In canonical form, so that rows of equal choices run together however these were written.
        choices = [dict(parse_choice(choice, self.pool)) or None for choice in adapters]
        result = run_rows(run, args, kwargs, choices)
        self._last_call.aux = result.aux
        return result.output

    @property
    def aux(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Extra outputs asked for with ``aux=``, of this thread's last call: name -> site path -> tensor."""
        outputs: Mapping[str, Mapping[str, torch.Tensor]] = getattr(self._last_call, "aux", {})
        return outputs

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
            touched, before = self._states.touched(self._state, choice), self._state
            written, blocked = self._write(choice) if self.engine.fused else (self._bind(choice), 0.0)
            changed = self._state
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

    @property
    def adapters(self) -> dict[str, Adapter]:
        """Name -> adapter."""
        return self.pool.adapters

    def add_prepared(self, adapter: Adapter, prepared: PreparedAdapter) -> None:
        """Add an adapter that fits the plans; one that fails to be added leaves no trace."""

        def add() -> None:
            self.pool.add(adapter, prepared)
            self._on_adapters_changed()
            if not self.engine.fused:
                self._states.of(((adapter.name, Active()),))

        self._all_or_nothing(add)

    def remove_adapter(self, name: str) -> None:
        """Remove an adapter, and take it out of the active choice; if that fails, nothing changes."""

        def remove() -> None:
            if name in dict(self._state.choice):
                self.swap({n: active for n, active in self._state.choice if n != name})
            self.pool.remove(name)
            self._states.forget(name)
            for cache in filter(None, (ref() for ref in self.prompt_caches.valuerefs())):
                cache.forget(self.engine, name)
            self._on_adapters_changed()

        self.refuse_baked()
        self._all_or_nothing(remove)

    def _all_or_nothing(self, change: Callable[[], None]) -> None:
        """Add or remove adapters; an error or interruption leaves everything as before."""
        self._call_lock.refuse_within()
        with self._swap_lock:
            state, entries, states = self._state, self.pool.entries, dict(self._states.cached)
            try:
                change()
            except BaseException:
                self.pool.entries, self._states.cached = entries, states
                self._restore(state)
                self._on_adapters_changed()
                raise

    def rebind(self) -> None:
        """Compute everything again that was computed from the model's tensors: their dtype or device changed."""
        with self._swap_lock:
            self.pool.invalidate()
            self._states.clear()
            if self.mode == "live":
                self._activate(self._states.of(self._state.choice))

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

    def save_choice(self, path: str | Path, adapters: ChoiceSpec, component: str = MAIN_GRAPH) -> None:
        """Write a choice as an ``.onnx_adapter`` file (as safetensors, if ``portable``), to run without lorac.

        ``save`` writes such a file for each adapter. This method writes one for a mixture, or for an adapter that was
        added later.

        Raises:
            AdapterNotFound, ChoiceError, NeedsRecompile: as for ``swap``, or there is no such component.
            Unavailable: the target has no such files, or the choice does not fit into one.
        """
        self.refuse_baked()
        with self._swap_lock:
            self._states.save(parse_choice(adapters, self.pool), component, path)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that was set, or the artifact's; None if there is neither."""
        if isinstance(self._tokenizer, TokenizerFiles):
            self._tokenizer = self._tokenizer.load()
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
