"""The TensorRT engine: a plan per graph; a choice of adapters is a set of tensors whose addresses a call sets.

The first call loads the plans, so everything except calls works on a machine without a GPU.
"""

import contextlib
import threading
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lorac.argument_types import JsonMapping
from lorac.backends.onnx.engine import OnnxEngine, OnnxProgram
from lorac.backends.tensorrt.device.cuda_graphs import GRAPHS_NOTE
from lorac.backends.tensorrt.device.device_slots import DeviceSlots
from lorac.backends.tensorrt.device.requirements import (
    check_requirements,
    current_device,
    missing_requirement,
    plan_device,
    warn_missing_requirement,
)
from lorac.backends.tensorrt.device.stream_queue import finish_device
from lorac.backends.tensorrt.options import TensorRTOptions
from lorac.backends.tensorrt.plan_cache import PlanCache
from lorac.backends.tensorrt.plan_runner import PlanRunner
from lorac.backends.tensorrt.profiles import SizeRange, SizeRanges, axis_names, check_sizes
from lorac.backends.tensorrt.refitting import WeightRefitter
from lorac.ir.calls.interface import Interface
from lorac.ir.graph.graph import SlotInput
from lorac.ir.slots.buffers import FusedBuffer, base_on_device, make_fused_buffers
from lorac.ir.slots.composition import ComposedWeights
from lorac.ir.slots.places import ADAPTERS_AXIS
from lorac.storage.open_file import OpenFile
from lorac.target.placed_engine import LoadedProgram

PLAN_FILE = "engine.plan"
"""The name of a graph's plan, next to the model that it was built from."""


@dataclass(frozen=True, kw_only=True)
class PlanFacts:
    """The sizes, dtypes and GPUs for which a plan was built.

    Attributes:
        ranges: the sizes of every input.
        dtypes: the dtype of every input.
        capabilities: the GPUs' compute capabilities; empty: the library's default.
        made_by: the library and its release.
    """

    ranges: SizeRanges
    dtypes: Mapping[str, torch.dtype]
    capabilities: tuple[str, ...]
    made_by: str

    def to_json(self) -> dict[str, object]:
        """Return the facts as JSON."""
        return {
            "ranges": {name: [astuple(axis) for axis in axes] for name, axes in self.ranges.items()},
            "dtypes": {name: str(dtype).removeprefix("torch.") for name, dtype in self.dtypes.items()},
            "capabilities": list(self.capabilities),
            "made_by": self.made_by,
        }

    @classmethod
    def from_json(cls, stored: JsonMapping) -> "PlanFacts":
        """Return the facts that ``to_json`` stored."""
        return PlanFacts(
            ranges={name: tuple(SizeRange(*axis) for axis in axes) for name, axes in stored["ranges"].items()},
            dtypes={name: getattr(torch, dtype) for name, dtype in stored["dtypes"].items()},
            capabilities=tuple(stored["capabilities"]),
            made_by=stored["made_by"],
        )


@dataclass(frozen=True, kw_only=True)
class GraphPlan:
    """One graph of the program, with its plan.

    Attributes:
        file: the file of the plan.
        interface: its inputs and outputs.
        slots: its slot inputs, by public name.
        facts: the sizes, dtypes and GPUs for which the plan was built.
    """

    file: OpenFile
    interface: Interface
    slots: Mapping[str, SlotInput]
    facts: PlanFacts

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """The dtype of every input."""
        return self.facts.dtypes


class TrtEngine(OnnxEngine[GraphPlan, TensorRTOptions]):
    """An engine of one plan per graph; it warns if plans cannot run on this machine.

    Attributes:
        device: the GPU on which plans run; the CPU on a machine without a GPU.
    """

    target = "tensorrt"

    def __init__(self, program: LoadedProgram[GraphPlan, TensorRTOptions]) -> None:
        self.device = plan_device(program.options.device)
        super().__init__(program)
        self._changed_weights: frozenset[str] = frozenset()
        self._runners: dict[str, PlanRunner] = {}
        self._refitters: dict[str, WeightRefitter] = {}
        self._loading = threading.Lock()
        self._written_slots: dict[str, DeviceSlots] = {}
        warn_missing_requirement()

    def bind_tensors(self, tensors: Mapping[str, Tensor]) -> "TrtProgram":
        """Bind the tensors; the first call that reads them copies them to the GPU."""
        return TrtProgram(self, tensors)

    @property
    def written_program(self) -> "TrtProgram":
        return TrtProgram(self, {} if self.options.refit else self.memory, self._written_slots, is_written=True)

    def allocate_weights(self) -> tuple[dict[str, FusedBuffer], dict[str, Tensor]]:
        return make_fused_buffers(self.plans, base_on_device(self.base, self.device))

    def machine_notes(self, graph: GraphPlan) -> tuple[str, ...]:
        """Describe why plans cannot run on this machine, and the limit on CUDA graphs."""
        why = missing_requirement()
        return (*(() if why is None else (why,)), *((GRAPHS_NOTE,) if self.options.cuda_graphs else ()))

    def write(self, snapshot: ComposedWeights) -> int:
        """Write weights in place by torch's kernels; replace those that are constants of plans."""
        with contextlib.ExitStack() as stack:
            for runner in self._runners.values():
                stack.enter_context(runner.writing())
            written = super().write(snapshot)
        changed = {path for path, composed in snapshot.composed.items() if composed.change is not None}
        self._changed_weights = frozenset(name for name in self.memory if self.slots[name].site in changed)
        for refitter in self._refitters.values():
            refitter.write(self._changed_weights & refitter.memory.keys())
        return written

    def most_places(self, graph: str) -> int | None:
        plan = self.graphs[graph]
        return next((plan.facts.ranges[name][0].most for name, slot in plan.slots.items() if slot.placed), None)

    def runner(self, graph: str) -> PlanRunner:
        """Return the runner of a graph's plan, which is loaded once."""
        check_requirements()
        with self._loading:
            if graph not in self._runners:
                self._runners[graph] = self._load(graph)
            return self._runners[graph]

    def _load(self, graph: str) -> PlanRunner:
        plan, folder = self.graphs[graph], self.options.plan_cache
        # Weights may have been made and written on other streams than this call's.
        finish_device(self.device)
        with current_device(self.options.device):
            kernels = None if folder is None else PlanCache(Path(folder)).kernels(plan.file.digest())
        runner = PlanRunner(
            plan.file.mapped() if plan.file.size else b"",
            self.device,
            capabilities=plan.facts.capabilities,
            made_by=plan.facts.made_by,
            cuda_graphs=self.options.cuda_graphs,
            kernels=kernels,
        )
        if self.options.refit:
            weights = {name: tensor for name, tensor in self.memory.items() if name in plan.slots}
            refitter = self._refitters[graph] = WeightRefitter(runner.engine, weights, runner.library)
            refitter.write(self._changed_weights & weights.keys())
        return runner


@dataclass(frozen=True, eq=False)
class TrtProgram(OnnxProgram):
    """The program with the tensors of a choice of adapters.

    Attributes:
        by_graph: graph -> its slots in the form that its plan reads, made by the first call.
        is_written: whether the tensors are written in place.
    """

    engine: TrtEngine
    by_graph: dict[str, DeviceSlots] = field(default_factory=dict)
    is_written: bool = False

    def run_graph(self, graph: str, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Run a graph's plan.

        Raises:
            Unavailable: this machine has no GPU, or one for which the plan was not built.
            InputMismatch: the plan was not built for the size of an input, or rows have too many choices.
        """
        plan = self.engine.graphs[graph]
        check_sizes(plan.facts.ranges, inputs, axis_names(plan.interface))
        runner = self.engine.runner(graph)
        if graph not in self.by_graph:
            slots = {name: self.tensors[name] for name in plan.slots if name in self.tensors}
            check_sizes(plan.facts.ranges, slots, dict.fromkeys(((name, 0) for name in slots), ADAPTERS_AXIS))
            self.by_graph[graph] = runner.hold(slots, fixed=self.is_written)
        outputs = runner.call(inputs, self.by_graph[graph])
        return [outputs[name] for name in plan.interface.outputs]
