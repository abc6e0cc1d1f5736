"""The TensorRT engine: a plan per graph; a choice of adapters is a set of tensors whose addresses a call sets.

Plans are loaded by the first call, so that everything but calling works where there is no GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lorac.backends.onnx.files import name_of, names_of
from lorac.backends.tensorrt.caching import PlanCache
from lorac.backends.tensorrt.device.requirements import lacking, refuse_lacking
from lorac.backends.tensorrt.device.slots import Slots
from lorac.backends.tensorrt.options import Options
from lorac.backends.tensorrt.profiles import Ranges, axes_of, refuse_outside
from lorac.backends.tensorrt.refitting import Refitting
from lorac.backends.tensorrt.running import Running
from lorac.ir.binding import Answer, Binding
from lorac.ir.engine import Engine, Files
from lorac.ir.graph.feeds import fed, fitted, grouped_aux, named_tensors
from lorac.ir.graph.graph import SlotInput
from lorac.ir.graph.signature import CallSignature
from lorac.ir.host.components import require_component
from lorac.ir.host.sites import BaseReader
from lorac.ir.slots.buffers import base_at, fused_buffers
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
        made_by: the library and its release.
    """

    file: HeldFile
    signature: CallSignature
    slots: Mapping[str, SlotInput]
    ranges: Ranges
    dtypes: Mapping[str, torch.dtype]
    capabilities: tuple[str, ...]
    made_by: str


@dataclass(frozen=True, eq=False)
class Values:
    """What a choice of adapters comes to.

    Attributes:
        tensors: slot input -> tensor.
        fixed: they are written in place.
        held: graph -> its slots as its plan reads them; made at the first call.
    """

    tensors: Mapping[str, Tensor]
    fixed: bool = False
    held: dict[str, Slots] = field(default_factory=dict)


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
        self.buffers, self.memory = fused_buffers(self.plans, base_at(base, device)) if self.fused else ({}, {})
        self._written = Values({} if options.refit else self.memory, fixed=True)
        self._touched: frozenset[str] = frozenset()
        self._running: dict[str, Running] = {}
        self._refitting: dict[str, Refitting] = {}
        self._loading = threading.Lock()

    # --- the engine's contract ---------------------------------------------------------------------------------

    def bind(self, snapshot: Snapshot, slots: Mapping[str, SiteSlots]) -> Binding[Values]:
        """The slots' tensors, which the first call that reads them brings to the GPU."""
        return Binding(self, Values({} if self.constant else named_tensors(self.slots, self.plans, slots)))

    @property
    def written(self) -> Binding[Values]:
        """The memory that weights are written to."""
        return Binding(self, self._written)

    def write(self, snapshot: Snapshot) -> int:
        """Write weights by torch's kernels where they lie, and have plans whose constants they are replace those."""
        with contextlib.ExitStack() as stack:
            for running in self._running.values():
                stack.enter_context(running.writing())
            written = super().write(snapshot)
        changed = {path for path, found in snapshot.composed.items() if found.change is not None}
        self._touched = frozenset(name for name in self.memory if self.slots[name].site in changed)
        for refitting in self._refitting.values():
            refitting.write(self._touched & refitting.memory.keys())
        return written

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

        def run(given: dict[str, Any]) -> list[Any]:
            refuse_outside(part.ranges, given, names)
            inputs = {key: fitted(key, value, part.dtypes[key]) for key, value in given.items()}
            running = self._loaded(name)
            found = running.call(inputs, self._held(name, running, content))
            return [_as_it_came(found[output], given) for output in part.signature.outputs]

        output, extra = part.signature.run(args, kwargs, run)
        return Answer(output, grouped_aux(extra, content.tensors))

    def _held(self, graph: str, running: Running, content: Values) -> Slots:
        """A choice's slots of a graph, laid out once."""
        if graph not in content.held:
            own = {name: content.tensors[name] for name in self.parts[graph].slots if name in content.tensors}
            content.held[graph] = running.hold(own, fixed=content.fixed)
        return content.held[graph]

    def _loaded(self, graph: str) -> Running:
        """A graph's plan as it runs, loaded once."""
        refuse_lacking()
        with self._loading:
            if graph not in self._running:
                self._running[graph] = self._load(graph)
            return self._running[graph]

    def _load(self, graph: str) -> Running:
        part, folder = self.parts[graph], self.options.plan_cache
        running = Running(
            part.file.read(),
            self.device,
            capabilities=part.capabilities,
            made_by=part.made_by,
            cuda_graphs=self.options.cuda_graphs,
            kernels=None if folder is None else PlanCache(Path(folder)).kernels(part.file.digest()),
        )
        if self.options.refit:
            own = {name: tensor for name, tensor in self.memory.items() if name in part.slots}
            refitting = self._refitting[graph] = Refitting(running.engine, own)
            refitting.write(self._touched & own.keys())
        return running


def _as_it_came(value: Tensor, given: Mapping[str, Any]) -> Any:
    """An output as the inputs were: an array where all of them were, and else where they lie."""
    if all(isinstance(one, np.ndarray) for one in given.values()):
        return value.cpu().numpy()
    return value.to(next(one.device for one in given.values() if isinstance(one, Tensor)))


def _told(signature: CallSignature) -> CallSignature:
    """A signature that says what this machine cannot do."""
    why = lacking()
    return signature if why is None else dataclasses.replace(signature, notes=(*signature.notes, why))
