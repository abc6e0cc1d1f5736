"""One plan on one GPU: torch's tensors are its memory, torch's current stream is where it runs.

It may be called from any thread. A context serves one call at a time, so there are several, made when all that there
are serve. What a call reads is what it is given: nothing of it is kept, and nothing is copied that lies on the GPU
already.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from lorac.backends.tensorrt import library
from lorac.backends.tensorrt.capabilities import capability_of
from lorac.backends.tensorrt.device.cuda_graphs import CudaGraphCache, record_on_cuda
from lorac.backends.tensorrt.device.device_slots import DeviceSlots, TensorLayouts, copy_to_engine, is_readable
from lorac.backends.tensorrt.device.execution_slot import ExecutionSlot
from lorac.backends.tensorrt.device.interfaces import CudaEngine
from lorac.backends.tensorrt.device.io_tensors import IOTensors
from lorac.backends.tensorrt.device.requirements import (
    check_capability,
    check_library,
    check_plan,
    resolve_cuda_device,
)
from lorac.backends.tensorrt.device.stream_queue import StreamQueue
from lorac.backends.tensorrt.plan_cache import KernelCache
from lorac.errors import ArtifactError, Unavailable

Tensor = torch.Tensor
MAX_CONTEXTS = 4
"""How many calls are queued at the same time; each context takes the memory that the plan computes in."""


# ── Calls ────────────────────────────────────────────────────────────────────────────────────────────────────────────
class ContextPool:
    """Calls of an engine with any slots, from any thread.

    Args:
        ports: what the engine takes and gives.
        device: where its tensors lie.
        lane: makes a context.
        graphs: CUDA graphs to run; None to run without.
    """

    def __init__(
        self,
        ports: IOTensors,
        device: torch.device,
        lane: Callable[[], ExecutionSlot],
        graphs: CudaGraphCache | None = None,
    ) -> None:
        self.ports, self.device, self._lane, self._graphs = ports, device, lane, graphs
        self._layouts = TensorLayouts(device)
        self._lanes: list[ExecutionSlot] = []
        self._idle: list[ExecutionSlot] = []
        self._count = 0
        self._changed = threading.Condition()

    def hold(self, tensors: Mapping[str, Tensor], *, fixed: bool = False) -> DeviceSlots:
        """Slots of a choice of adapters, laid out once: on the GPU, contiguous and aligned.

        Args:
            tensors: slot input -> tensor; those that the engine has no input for are left out.
            fixed: they are written in place, and calls read what is written (``DeviceSlots``).

        Raises:
            Unavailable: they are fixed, and the engine cannot read them where they lie.
        """
        ports = self.ports.inputs
        held = {name: self._layouts.laid_out(tensor, ports[name]) for name, tensor in tensors.items() if name in ports}
        copied = [name for name, tensor in held.items() if tensor.data_ptr() != tensors[name].data_ptr()]
        if fixed and copied:
            raise Unavailable(
                f"'{copied[0]}' cannot be read where it lies: on {tensors[copied[0]].device}, as "
                f"{tensors[copied[0]].dtype}; the plan takes {ports[copied[0]].dtype} on {self.device}",
                next_step="this is a bug of lorac's, not of your model",
            )
        return DeviceSlots(held, fixed=fixed)

    def call(self, inputs: Mapping[str, Tensor], slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One call.

        Args:
            inputs: the model's inputs, by name; those that the engine has no input for are left out.
            slots: what ``hold`` gave; other tensors are laid out for this call alone.

        Returns:
            The outputs by name: on the CPU where all inputs are, else on the GPU, where torch's current stream has
            them.

        Raises:
            InputMismatch: an input is missing, or of a size that the plan was not built for.
            Unavailable: TensorRT fails.
        """
        held = slots if isinstance(slots, DeviceSlots) else self.hold(slots)
        given = {name: self._given(name, tensor) for name, tensor in inputs.items() if name in self.ports.inputs}
        captured = None if self._graphs is None else self._graphs.serving(given, held)
        if captured is not None:
            found = captured.run(given, held)
        else:
            with self._one() as lane:
                found = lane.run(given, held)
        from_cpu = bool(inputs) and all(tensor.device.type == "cpu" for tensor in inputs.values())
        return {name: tensor.cpu() for name, tensor in found.items()} if from_cpu else found

    def finish(self) -> None:
        """Wait for all that was queued: before memory is written that calls read."""
        for lane in self.lanes():
            lane.track.finish()

    def lanes(self) -> list[ExecutionSlot]:
        """All contexts that there are."""
        with self._changed:
            pooled = list(self._lanes)
        return pooled if self._graphs is None else pooled + self._graphs.lanes()

    def _given(self, name: str, tensor: Tensor) -> Tensor:
        """An input where the engine reads it; unlike a slot's, its copy is never used again: it may be written to."""
        port = self.ports.inputs[name]
        return tensor.detach() if is_readable(tensor, port, self.device) else copy_to_engine(tensor, port, self.device)

    @contextlib.contextmanager
    def _one(self) -> Iterator[ExecutionSlot]:
        """A context that nobody else uses inside the block."""
        lane = self._taken()
        try:
            yield lane
        finally:
            with self._changed:
                self._idle.append(lane)
                self._changed.notify()

    def _taken(self) -> ExecutionSlot:
        with self._changed:
            self._changed.wait_for(lambda: self._idle or self._count < MAX_CONTEXTS)
            if self._idle:
                return self._idle.pop()
            self._count += 1
        try:
            made = self._lane()
        except BaseException:
            with self._changed:
                self._count -= 1
                self._changed.notify()
            raise
        with self._changed:
            self._lanes.append(made)
        return made


# ── On a GPU ─────────────────────────────────────────────────────────────────────────────────────────────────────────
class PlanRunner:
    """A plan, loaded on a GPU.

    Args:
        plan: what TensorRT built.
        device: the GPU.
        capabilities: the compute capabilities that it was built for; empty where that is not known.
        made_by: as ``library.told`` said where it was built; None where that is not known.
        cuda_graphs: calls are CUDA graphs, one for each set of shapes.
        kernels: where TensorRT for RTX keeps the kernels that it compiled for this plan on this GPU.

    Raises:
        ArtifactError: it is no plan, or one of another version.
        Unavailable: torch has no CUDA, there is no GPU, or it is of another compute capability; TensorRT's own reason
            where it does not load.
    """

    def __init__(
        self,
        plan: bytes | memoryview,
        device: str | torch.device = "cuda",
        *,
        capabilities: Sequence[str] = (),
        made_by: str | None = None,
        cuda_graphs: bool = False,
        kernels: KernelCache | None = None,
    ) -> None:
        check_library(made_by)
        check_plan(plan)
        self.device = resolve_cuda_device(device)
        check_capability(capability_of(self.device), capabilities, torch.cuda.get_device_name(self.device))
        with torch.cuda.device(self.device):
            self.engine: Any = _deserialize_plan(plan, self.device)
            self._config = _RuntimeConfig(self.engine, kernels) if library.is_rtx() else None
        self.ports, self._making = IOTensors.of(self.engine), threading.Lock()
        graphs = CudaGraphCache(self.ports, self._lane, record_on_cuda) if cuda_graphs else None
        self._calls = ContextPool(self.ports, self.device, self._lane, graphs)

    def hold(self, tensors: Mapping[str, Tensor], *, fixed: bool = False) -> DeviceSlots:
        """As ``ContextPool.hold``."""
        with torch.cuda.device(self.device):
            return self._calls.hold(tensors, fixed=fixed)

    def call(self, inputs: Mapping[str, Tensor], slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As ``ContextPool.call``."""
        with torch.cuda.device(self.device):
            found = self._calls.call(inputs, slots)
            if self._config is not None:
                self._config.keep(sum(lane.met for lane in self._calls.lanes()))
        return found

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Write inside the block what calls read in place: those that were queued have passed, and later ones wait.

        The caller keeps new calls away meanwhile.
        """
        self._calls.finish()
        with torch.cuda.device(self.device):
            try:
                yield
            finally:
                torch.cuda.current_stream().synchronize()

    def _lane(self) -> ExecutionSlot:
        """A new context. It and what it is told are this device's, whichever is the caller's."""
        with self._making, torch.cuda.device(self.device), library.collect_errors() as said:
            config = () if self._config is None else (self._config.config,)
            context = self.engine.create_execution_context(*config)
            if context is None:
                raise Unavailable(
                    f"TensorRT has no memory to run the plan in: {said.why()}",
                    next_step="free some of the GPU's memory, or compile for smaller sizes",
                )
            return ExecutionSlot(context, self.ports, self.device, StreamQueue(self.device))


class _RuntimeConfig:
    """How TensorRT for RTX compiles a plan's kernels where it runs, and where those are kept.

    Kernels for the sizes of a call are compiled before its first run, never while later ones run: a kernel that took
    another's place would round differently, and what a swap gives would depend on what was called before (invariant 1).

    Args:
        engine: TensorRT's.
        kept: where the kernels are kept; None to compile them anew in every process.
    """

    def __init__(self, engine: Any, kept: KernelCache | None) -> None:
        self.config = engine.create_runtime_config()
        strategies = library.trt().DynamicShapesKernelSpecializationStrategy
        self.config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        self._cache = self.config.create_runtime_cache()
        self._kept, self._next, self._lock = kept, 1, threading.Lock()
        found = None if kept is None else kept.read()
        with library.collect_errors() as said:
            if found is not None and not self._cache.deserialize(found):
                said.why()  # made by another driver: what it holds is compiled anew, and written over it
        self.config.set_runtime_cache(self._cache)

    def keep(self, met: int) -> None:
        """Write down what was compiled, each time that the number of shapes has doubled."""
        if self._kept is None or met < self._next or not self._lock.acquire(blocking=False):
            return
        try:
            self._next = 2 * met
            self._kept.write(memoryview(self._cache.serialize()))
        finally:
            self._lock.release()


def _deserialize_plan(plan: bytes | memoryview, device: torch.device) -> CudaEngine:
    """The engine of a plan on the current device."""
    with library.collect_errors() as said:
        runtime = library.trt().Runtime(library.logger())
        engine: Any = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise ArtifactError(
                f"{library.name_and_version()} does not load the plan on {torch.cuda.get_device_name(device)}: "
                f"{said.why()}",
                next_step="compile again from the model on this machine",
            )
    if engine.streamable_weights_size > 0:
        engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
    found: CudaEngine = engine
    return found
