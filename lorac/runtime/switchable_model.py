"""An engine whose adapters can be switched, added and removed while it runs."""

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lorac.adapters.pool import AdapterPool
from lorac.frontend.components import MAIN_GRAPH, list_components
from lorac.frontend.host import Host
from lorac.ir.calls.call import Call
from lorac.ir.sites.site import BaseReader
from lorac.ir.slots.choice import UNSET, Active, ChoiceSpec, parse_choice
from lorac.ir.slots.plans import PreparedAdapter, SitePlan
from lorac.runtime.batching import check_rows, run_rows
from lorac.runtime.choice_switch import ChoiceSwitch
from lorac.runtime.generation.prompt_cache import PromptCache
from lorac.runtime.generation.tokenizers import TokenizerFiles
from lorac.runtime.held_choice import HeldChoice
from lorac.runtime.row_group import RowGroup
from lorac.runtime.traits import ModelTraits
from lorac.target.engine import CallResult, Engine
from lorac.target.memory_budget import MemoryBudget
from lorac.variants.adapter import Adapter


class SwitchableModel(ChoiceSwitch, ABC):
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
        ChoiceSwitch.__init__(self, engine, plans, pool, base, mode)
        self.traits, self.input_dtypes = traits, input_dtypes
        self._last_call = threading.local()
        self._tokenizer: Any = None
        self.prompt_caches = weakref.WeakValueDictionary[int, PromptCache]()

    @abstractmethod
    def _on_adapters_changed(self) -> None:
        """React to adapters that were added or removed."""

    def bind(self, graph: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Call:
        """Bind the arguments of a call of a graph, in the dtypes that the compiled model takes."""
        interface, kept = self.engine.interfaces.get(graph), list[object]()
        call = Call(args, kwargs) if interface is None else interface.bind(args, kwargs)
        if not self.input_dtypes:
            return call
        if interface is not None:  # timesteps, which in half precision would be others
            kept = [call.kwargs[name] for name in interface.row_numbers if name in call.kwargs]
        elif self.engine.module is not None:
            kept = Host.of(list_components(self.engine.module)[graph]).list_row_numbers(call)
        return call.cast(self.input_dtypes, kept)

    def call(
        self,
        call: Call,
        adapters: ChoiceSpec | HeldChoice | Sequence[ChoiceSpec | HeldChoice] = UNSET,
        graph: str = MAIN_GRAPH,
    ) -> Any:
        """Run a graph once, with the active adapters or with a choice for this call, or one for each row."""

        def run(own: Call, group: RowGroup) -> CallResult:
            return self.with_rows(group, lambda bound, _: bound.run(graph, own))

        if isinstance(adapters, Sequence) and not isinstance(adapters, str):
            check_rows(call.rows, adapters)
            result = self.run_grouped(adapters, graph, lambda groups: run_rows(run, call, groups))
        else:
            result = self.with_choice(adapters, lambda bound, _: bound.run(graph, call))
        self._last_call.aux = result.aux
        return result.output

    @property
    def aux(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Extra outputs asked for with ``aux=``, of this thread's last call: name -> site path -> tensor."""
        outputs: Mapping[str, Mapping[str, torch.Tensor]] = getattr(self._last_call, "aux", {})
        return outputs

    @property
    def adapters(self) -> dict[str, Adapter]:
        """Name -> adapter."""
        return self.pool.adapters

    @property
    def prepared_adapters(self) -> dict[str, PreparedAdapter]:
        """Name -> prepared adapter, of the adapters in memory and those of the active choice."""
        names = dict.fromkeys((*self.adapters, *dict(self.choice)))
        return {name: self.pool[name] for name in names if name in self.pool}

    @property
    def memory(self) -> MemoryBudget:
        """The bytes that adapters and caches take, and the most that they may: ``memory.limit = 1 << 30``."""
        return self.pool.budget

    def add_prepared(self, adapter: Adapter, prepared: PreparedAdapter) -> None:
        """Add an adapter that fits the plans; one that fails to be added leaves no trace."""

        def add() -> None:
            self.pool.add(adapter, prepared)
            self._on_adapters_changed()
            if not self.engine.fused:
                self._states.of(((adapter.name, Active()),))

        def undo() -> None:
            if adapter.name in self.pool:
                self.pool.remove(adapter.name)
            self._states.forget(adapter.name)

        self._call_lock.refuse_within()
        with self._swap_lock:
            self.pool.check_name_free(adapter.name)
            self._all_or_nothing(add, undo)

    def remove_adapter(self, name: str) -> None:
        """Remove an adapter, and take it out of the active choice; if that fails, nothing changes.

        What it takes is free when the last call ends that it is part of.
        """

        def remove() -> None:
            if name in dict(self._state.choice):
                self.swap({n: active for n, active in self._state.choice if n != name})
            self.pool.remove(name)
            self._states.forget(name)
            for cache in filter(None, (ref() for ref in self.prompt_caches.valuerefs())):
                cache.forget(self.engine, name)
            self._on_adapters_changed()

        def undo() -> None:
            self.pool.entries = entries
            self._restore(state)

        self.refuse_baked()
        self._call_lock.refuse_within()
        with self._swap_lock:
            state, entries = self._state, self.pool.entries
            self._all_or_nothing(remove, undo)

    def _all_or_nothing(self, change: Callable[[], None], undo: Callable[[], None]) -> None:
        """Add or remove adapters; an error or interruption leaves everything as before."""
        try:
            change()
        except BaseException:
            undo()
            self._on_adapters_changed()
            raise

    def rebind(self) -> None:
        """Compute everything again that was computed from the model's tensors: their dtype or device changed."""
        with self._swap_lock:
            self.pool.invalidate()
            self._states.clear()
            if self.mode == "live":
                self._activate(self._states.of(self._state.choice))

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
