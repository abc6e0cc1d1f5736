"""The TensorRT engine: a plan per graph; a choice of adapters is a set of tensors whose addresses a call sets.

Plans are loaded by the first call, so that everything but calling works where there is no GPU.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lorac.backends.onnx.model_files import graph_file, list_program_files
from lorac.backends.tensorrt.device.device_slots import DeviceSlots
from lorac.backends.tensorrt.device.requirements import check_requirements, missing_requirement
from lorac.backends.tensorrt.options import TensorRTOptions
from lorac.backends.tensorrt.plan_cache import PlanCache
from lorac.backends.tensorrt.plan_runner import PlanRunner
from lorac.backends.tensorrt.profiles import SizeRanges, axis_names, check_sizes
from lorac.backends.tensorrt.refitting import WeightRefitter
from lorac.frontend.components import check_component
from lorac.ir.graph.feeds import collect_slot_tensors, convert_input, group_aux_outputs, select_reached_plans
from lorac.ir.graph.graph import SlotInput
from lorac.ir.interface import Interface
from lorac.ir.sites import BaseReader
from lorac.ir.slots.buffers import base_on_device, make_fused_buffers
from lorac.ir.slots.composition import ComposedWeights
from lorac.ir.slots.plans import SitePlan, SiteSlots
from lorac.storage.open_file import OpenFile
from lorac.target.engine import BoundProgram, CallResult, Engine, ProgramFiles

if TYPE_CHECKING:
    from lorac.report.dump import Dump

Tensor = torch.Tensor
PLAN = "engine.plan"
"""What a graph's plan is called, beside the model that it was built of."""


def plan_files(graphs: Iterable[str]) -> list[str]:
    """Names of all the files that a program may have."""
    known = list(graphs)
    return [*list_program_files(known), *(graph_file(graph, PLAN) for graph in known)]


@dataclass(frozen=True)
class GraphPlan:
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

    file: OpenFile
    signature: Interface
    slots: Mapping[str, SlotInput]
    ranges: SizeRanges
    dtypes: Mapping[str, torch.dtype]
    capabilities: tuple[str, ...]
    made_by: str


@dataclass(frozen=True, eq=False)
class SlotTensors:
    """What a choice of adapters comes to.

    Attributes:
        tensors: slot input -> tensor.
        fixed: they are written in place.
        held: graph -> its slots as its plan reads them; made at the first call.
    """

    tensors: Mapping[str, Tensor]
    fixed: bool = False
    held: dict[str, DeviceSlots] = field(default_factory=dict)


class TrtEngine(Engine[SlotTensors]):
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
    files: ProgramFiles

    def __init__(
        self,
        *,
        parts: Mapping[str, GraphPlan],
        plans: Mapping[str, SitePlan],
        base: BaseReader,
        mode: str,
        files: ProgramFiles,
        options: TensorRTOptions,
        device: torch.device,
    ) -> None:
        self.parts = parts
        self.slots = {name: slot for part in parts.values() for name, slot in part.slots.items()}
        self.plans = select_reached_plans(self.slots, plans)
        self.base, self.mode, self.files, self.options, self.device = base, mode, files, options, device
        self.interfaces = {name: _signature_with_notes(part.signature) for name, part in parts.items()}
        self.buffers, self.memory = (
            make_fused_buffers(self.plans, base_on_device(base, device)) if self.fused else ({}, {})
        )
        self._written = SlotTensors({} if options.refit else self.memory, fixed=True)
        self._touched: frozenset[str] = frozenset()
        self._running: dict[str, PlanRunner] = {}
        self._refitting: dict[str, WeightRefitter] = {}
        self._loading = threading.Lock()

    # --- the engine's contract ---------------------------------------------------------------------------------

    def bind(self, snapshot: ComposedWeights, slots: Mapping[str, SiteSlots]) -> BoundProgram[SlotTensors]:
        """The slots' tensors, which the first call that reads them brings to the GPU."""
        return BoundProgram(
            self, SlotTensors({} if self.constant else collect_slot_tensors(self.slots, self.plans, slots))
        )

    @property
    def written_program(self) -> BoundProgram[SlotTensors]:
        """The memory that weights are written to."""
        return BoundProgram(self, self._written)

    def write(self, snapshot: ComposedWeights) -> int:
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

    def record_written(self, snapshot: ComposedWeights) -> None:
        """Nothing: what was written is in the memory that plans read."""

    def dump(self) -> dict[str, Dump]:
        """The models that the plans were built of."""
        from lorac.backends.onnx.model_dump import dump_model  # what a call does not need

        return {name: dump_model(self.files, name, part.slots) for name, part in self.parts.items()}

    def activate(self, content: SlotTensors) -> None:
        """Nothing: every call names its binding."""

    @property
    def constant(self) -> bool:
        """A baked program's adapters are constants."""
        return self.mode == "baked"

    # --- calls -------------------------------------------------------------------------------------------------

    def call(
        self, content: SlotTensors, graph: str, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> CallResult:
        """One call of a graph with a binding.

        Raises:
            Unavailable: there is no GPU here, or the plan was not built for the one that there is.
            InputMismatch: an input has a size that the plan was not built for.
        """
        name = check_component(graph, self.parts)
        part, names = self.parts[name], axis_names(self.parts[name].signature)

        def run(given: dict[str, Any]) -> list[Any]:
            check_sizes(part.ranges, given, names)
            inputs = {key: convert_input(key, value, part.dtypes[key]) for key, value in given.items()}
            running = self._loaded(name)
            found = running.call(inputs, self._held(name, running, content))
            return [_match_inputs(found[output], given) for output in part.signature.outputs]

        output, extra = part.signature.run(args, kwargs, run)
        return CallResult(output, group_aux_outputs(extra, content.tensors))

    def _held(self, graph: str, running: PlanRunner, content: SlotTensors) -> DeviceSlots:
        """A choice's slots of a graph, laid out once."""
        if graph not in content.held:
            own = {name: content.tensors[name] for name in self.parts[graph].slots if name in content.tensors}
            content.held[graph] = running.hold(own, fixed=content.fixed)
        return content.held[graph]

    def _loaded(self, graph: str) -> PlanRunner:
        """A graph's plan as it runs, loaded once."""
        check_requirements()
        with self._loading:
            if graph not in self._running:
                self._running[graph] = self._load(graph)
            return self._running[graph]

    def _load(self, graph: str) -> PlanRunner:
        part, folder = self.parts[graph], self.options.plan_cache
        running = PlanRunner(
            part.file.read(),
            self.device,
            capabilities=part.capabilities,
            made_by=part.made_by,
            cuda_graphs=self.options.cuda_graphs,
            kernels=None if folder is None else PlanCache(Path(folder)).kernels(part.file.digest()),
        )
        if self.options.refit:
            own = {name: tensor for name, tensor in self.memory.items() if name in part.slots}
            refitting = self._refitting[graph] = WeightRefitter(running.engine, own)
            refitting.write(self._touched & own.keys())
        return running


def _match_inputs(value: Tensor, given: Mapping[str, Any]) -> Any:
    """An output as the inputs were: an array where all of them were, and else where they lie."""
    if all(isinstance(one, np.ndarray) for one in given.values()):
        return value.cpu().numpy()
    return value.to(next(one.device for one in given.values() if isinstance(one, Tensor)))


def _signature_with_notes(signature: Interface) -> Interface:
    """A signature that says what this machine cannot do."""
    why = missing_requirement()
    return signature if why is None else signature.with_notes(why)
