"""The TensorRT engine: a plan per graph; a choice of adapters is a set of tensors whose addresses a call sets.

Plans are loaded by the first call, so that everything but calling works where there is no GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import threading
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from lorac.backends.onnx.files import name_of, names_of
from lorac.backends.tensorrt.capabilities import lacking, refuse_lacking
from lorac.backends.tensorrt.options import Options
from lorac.backends.tensorrt.placing import Placing
from lorac.backends.tensorrt.profiles import Ranges, axes_of, refuse_outside
from lorac.ir.binding import Answer, Binding
from lorac.ir.engine import Engine, Files
from lorac.ir.graph.feeds import fed, fitted, grouped_aux, named_tensors
from lorac.ir.graph.graph import SlotInput
from lorac.ir.graph.signature import CallSignature
from lorac.ir.host.components import require_component
from lorac.ir.host.sites import BaseReader
from lorac.ir.slots.buffers import fused_buffers
from lorac.ir.slots.site import SitePlan, SiteSlots
from lorac.ir.slots.snapshot import Snapshot
from lorac.ir.store.held import HeldFile

if TYPE_CHECKING:
    from lorac.ir.view.dump import Dump

Tensor = torch.Tensor
PLAN = "engine.plan"
"""What a graph's plan is called, beside the model that it was built of."""


def files_of(graphs: Iterable[str]) -> list[str]:
    """Names of all the files that a program may have."""
    known = list(graphs)
    return [*names_of(known), *(name_of(graph, PLAN) for graph in known)]


class Runs(Protocol):
    """A plan that was loaded."""

    def call(self, inputs: Mapping[str, Tensor], slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name, for inputs and slots by name."""

    def writing(self) -> AbstractContextManager[None]:
        """A block within which what calls read may be written: those that are queued have passed."""


@dataclass(frozen=True)
class Plan:
    """One graph of the program, as it was built.

    Attributes:
        file: the plan.
        signature: how the graph's host is called.
        slots: its slot inputs by public name.
        ranges: the sizes that it was built for, of every input.
        dtypes: the dtype of every input.
        capabilities: the compute capabilities it was built for; empty: the library's default.
    """

    file: HeldFile
    signature: CallSignature
    slots: Mapping[str, SlotInput]
    ranges: Ranges
    dtypes: Mapping[str, torch.dtype]
    capabilities: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Values:
    """Slot input -> the tensor that a call reads there."""

    tensors: Mapping[str, Tensor]


class TrtEngine(Engine):
    """Runs a program, one plan per graph.

    Args:
        parts: graph name -> its plan.
        plans: slots of every site.
        base: reads base weights without the host.
        mode: ``"live"``, ``"fused"`` or ``"baked"``.
        files: the program as it was emitted and built, and the base weights, held.
        options: the target's options.
        device: where plans run; the CPU's where there is no GPU.
    """

    target = "tensorrt"
    files: Files

    def __init__(
        self,
        *,
        parts: Mapping[str, Plan],
        plans: Mapping[str, SitePlan],
        base: BaseReader,
        mode: str,
        files: Files,
        options: Options,
        device: torch.device,
    ) -> None:
        self.parts = parts
        self.slots = {name: slot for part in parts.values() for name, slot in part.slots.items()}
        self.plans = fed(self.slots, plans)
        self.base, self.mode, self.files, self.options, self.device = base, mode, files, options, device
        self.signatures = {name: _told(part.signature) for name, part in parts.items()}
        self._placing = Placing(device)
        self.buffers, self.memory = fused_buffers(self.plans, self._placing.base(base)) if self.fused else ({}, {})
        self._written = Values(self.memory)
        self._running: dict[str, Runs] = {}
        self._loading = threading.Lock()

    # --- the engine's contract ---------------------------------------------------------------------------------

    def bind(self, snapshot: Snapshot, slots: Mapping[str, SiteSlots]) -> Binding[Values]:
        """The slots' tensors in the GPU's memory."""
        tensors = {} if self.constant else named_tensors(self.slots, self.plans, slots)
        return Binding(self, Values(self._placing.all_of(tensors)))

    @property
    def written(self) -> Binding[Values]:
        """The memory that weights are written to."""
        return Binding(self, self._written)

    def write(self, snapshot: Snapshot) -> int:
        """Write weights by kernels of the device that they lie on, from the base and changes that lie there too."""
        composed = {
            path: dataclasses.replace(found, change=self._placing.change(found.change))
            for path, found in snapshot.composed.items()
            if path in self.buffers and found.change is not None
        }
        with contextlib.ExitStack() as held:
            for running in self._running.values():
                held.enter_context(running.writing())
            return super().write(dataclasses.replace(snapshot, composed={**snapshot.composed, **composed}))

    def hold(self, snapshot: Snapshot) -> None:
        """Nothing: what was written is in the memory that plans read."""

    def listing(self) -> dict[str, Dump]:
        """The models that the plans were built of."""
        from lorac.backends.onnx.listing import listing  # what a call does not need

        return {name: listing(self.files, name, part.slots) for name, part in self.parts.items()}

    def activate(self, content: Values) -> None:
        """Nothing: every call names its binding."""

    @property
    def constant(self) -> bool:
        """A baked program's adapters are constants."""
        return self.mode == "baked"

    # --- calls -------------------------------------------------------------------------------------------------

    def call(self, content: Values, graph: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Answer:
        """One call of a graph with a binding.

        Raises:
            Unavailable: there is no GPU here, or the plan was not built for the one that there is.
            InputMismatch: an input has a size that the plan was not built for.
        """
        name = require_component(graph, self.parts)
        part, names = self.parts[name], axes_of(self.parts[name].signature)
        slots = {slot: content.tensors[slot] for slot in part.slots if slot in content.tensors}

        def run(given: dict[str, Any]) -> list[Any]:
            refuse_outside(part.ranges, given, names)
            inputs = {key: fitted(key, value, part.dtypes[key]) for key, value in given.items()}
            found = self._loaded(name).call(inputs, slots)
            return [_as_it_came(found[output], given) for output in part.signature.outputs]

        output, extra = part.signature.run(args, kwargs, run)
        return Answer(output, grouped_aux(extra, content.tensors))

    def _loaded(self, graph: str) -> Runs:
        """A graph's plan as it runs, loaded once."""
        refuse_lacking()
        with self._loading:
            if graph not in self._running:
                part, graphs = self.parts[graph], self.options.cuda_graphs
                told = {"capabilities": part.capabilities, "cuda_graphs": graphs}
                self._running[graph] = _running()(part.file.read(), self.device, **told)
            return self._running[graph]


@functools.cache
def _running() -> Any:
    """What loads a plan: imported where one is to run, since it takes a driver."""
    return importlib.import_module("lorac.backends.tensorrt.running").Running


def _as_it_came(value: Tensor, given: Mapping[str, Any]) -> Any:
    """An output as the inputs were: an array where all of them were, and else where they lie."""
    if all(isinstance(one, np.ndarray) for one in given.values()):
        return value.cpu().numpy()
    return value.to(next(one.device for one in given.values() if isinstance(one, Tensor)))


def _told(signature: CallSignature) -> CallSignature:
    """A signature that says what this machine cannot do."""
    why = lacking()
    return signature if why is None else dataclasses.replace(signature, notes=(*signature.notes, why))
