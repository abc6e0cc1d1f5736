"""One plan on one GPU, which runs in the memory of torch's tensors and on torch's current stream.

It may be called from any thread. A context runs one call at a time, so there are several; a new one is made when all
are in use. A call reads its tensors in place: no references are kept, and tensors on the GPU are not copied.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorac.backends.tensorrt.device.cuda_graphs import MAX_GRAPHS, CudaGraphCache, record_on_cuda
from lorac.backends.tensorrt.device.device_slots import DeviceSlots, TensorLayouts, copy_to_engine, is_readable
from lorac.backends.tensorrt.device.execution_slot import ExecutionSlot
from lorac.backends.tensorrt.device.interfaces import CudaEngine, IOTensors
from lorac.backends.tensorrt.device.requirements import (
    check_capability,
    check_plan,
    find_maker,
    resolve_cuda_device,
)
from lorac.backends.tensorrt.device.stream_queue import StreamQueue
from lorac.backends.tensorrt.library import TensorRTLibrary, capability_of, collect_errors, find_library
from lorac.backends.tensorrt.plan_cache import CachedFile
from lorac.errors import ArtifactError, Unavailable

if TYPE_CHECKING:
    import tensorrt

Plan = bytes | memoryview | mmap.mmap
MAX_CONTEXTS = 4
"""The most calls that are queued at the same time; each context has its own memory for intermediate values."""


class ContextPool:
    """A pool of contexts that runs calls of an engine with any slots, from any thread.

    Args:
        io: the inputs and outputs of the engine.
        device: the GPU.
        execution: a function that makes a context.
        graphs: CUDA graphs of calls; None to run without.
    """

    def __init__(
        self,
        io: IOTensors,
        device: torch.device,
        execution: Callable[[], ExecutionSlot],
        graphs: CudaGraphCache | None = None,
    ) -> None:
        self.io, self.device, self._new_execution, self._graphs = io, device, execution, graphs
        self._layouts = TensorLayouts(device)
        self._executions: list[ExecutionSlot] = []
        self._idle: list[ExecutionSlot] = []
        self._count = 0
        self._changed = threading.Condition()

    def hold(self, tensors: Mapping[str, Tensor], *, fixed: bool = False) -> DeviceSlots:
        """Return the slots of a choice of adapters on the GPU, contiguous and aligned; called once per choice.

        Args:
            tensors: slot input -> tensor; tensors for which the engine has no input are ignored.
            fixed: whether the tensors are written in place (``DeviceSlots``).

        Raises:
            Unavailable: the engine cannot read fixed tensors in place.
        """
        io = self.io.inputs
        known = {name: tensor for name, tensor in tensors.items() if name in io}
        laid_out = self._layouts.lay_out(known, io, fixed=fixed)
        copied = [name for name, tensor in laid_out.items() if tensor.data_ptr() != tensors[name].data_ptr()]
        if fixed and copied:
            raise Unavailable(
                f"'{copied[0]}' cannot be read where it lies: on {tensors[copied[0]].device}, as "
                f"{tensors[copied[0]].dtype}; the plan takes {io[copied[0]].dtype} on {self.device}",
                next_step="this is a bug of lorac's, not of your model",
            )
        return laid_out

    def call(self, inputs: Mapping[str, Tensor], slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one call.

        Args:
            inputs: the model's inputs by name; those for which the engine has no input are ignored.
            slots: the result of ``hold``; other tensors are laid out for this call only.

        Returns:
            The outputs by name: on the CPU if all inputs are, otherwise on the GPU, ready for torch's current stream.

        Raises:
            InputMismatch: an input is missing, or has a size for which the plan was not built.
            Unavailable: TensorRT fails.
        """
        laid_out = slots if isinstance(slots, DeviceSlots) else self.hold(slots)
        given = dict[str, Tensor]()
        for name, tensor in inputs.items():
            io_tensor = self.io.inputs.get(name)
            if io_tensor is not None:
                reads = is_readable(tensor, io_tensor, self.device)
                # A copy is used once, since the caller may write to the input.
                copied = None if reads else copy_to_engine(tensor, io_tensor, self.device, staged=True)
                given[name] = tensor.detach() if copied is None else copied
        captured = None if self._graphs is None else self._graphs.find(given, laid_out)
        if captured is not None:
            found = captured.run(given, laid_out)
        else:
            execution = self._take()
            try:
                found = execution.run(given, laid_out)
            finally:
                with self._changed:
                    self._idle.append(execution)
                    self._changed.notify()
        from_cpu = bool(inputs) and all(tensor.device.type == "cpu" for tensor in inputs.values())
        return {name: tensor.cpu() for name, tensor in found.items()} if from_cpu else found

    def finish(self) -> None:
        """Wait for all queued calls, before memory that they read is overwritten."""
        for execution in self.executions():
            execution.streams.finish()

    def executions(self) -> list[ExecutionSlot]:
        """Return all contexts."""
        with self._changed:
            pooled = list(self._executions)
        return pooled if self._graphs is None else pooled + self._graphs.executions()

    def _take(self) -> ExecutionSlot:
        with self._changed:
            self._changed.wait_for(lambda: self._idle or self._count < MAX_CONTEXTS)
            if self._idle:
                return self._idle.pop()
            self._count += 1
        try:
            made = self._new_execution()
        except BaseException:
            with self._changed:
                self._count -= 1
                self._changed.notify()
            raise
        with self._changed:
            self._executions.append(made)
        return made


class PlanRunner:
    """A runner of a plan on a GPU.

    Args:
        device: the GPU.
        capabilities: the compute capabilities for which it was built; empty if unknown.
        made_by: the name and version of the library that built it; None if unknown.
        cuda_graphs: whether calls are CUDA graphs, one for each set of shapes.
        kernels: the cache entry of the kernels that TensorRT for RTX compiled for this plan on this GPU.

    Raises:
        ArtifactError: the bytes are not a plan, or a plan of another version.
        Unavailable: torch has no CUDA, the machine has no GPU of these capabilities, or TensorRT cannot load the plan.
    """

    def __init__(
        self,
        plan: Plan,
        device: str | torch.device = "cuda",
        *,
        capabilities: Sequence[str] = (),
        made_by: str | None = None,
        cuda_graphs: bool = False,
        kernels: CachedFile | None = None,
    ) -> None:
        self.library = library = find_library() if made_by is None else find_maker(made_by)
        check_plan(plan, library)
        self.device = resolve_cuda_device(device)
        gpu = torch.cuda.get_device_name(self.device)
        check_capability(capability_of(self.device), capabilities, gpu, library)
        with torch.cuda.device(self.device):
            with collect_errors() as messages:
                runtime = library.module.Runtime(library.logger)
                engine: tensorrt.ICudaEngine | None = runtime.deserialize_cuda_engine(plan)
                if engine is None:
                    raise ArtifactError(
                        f"{library.name_and_version} does not load the plan on {gpu}: {messages.why()}",
                        next_step="compile again from the model on this machine",
                    )
            self.engine = engine
            set_streaming_budget(self.engine, MAX_CONTEXTS + (MAX_GRAPHS if cuda_graphs else 0))
            self._config = _RuntimeConfig(self.engine, kernels, library) if library.is_rtx else None
        self.io, self._making = IOTensors.of(self.engine), threading.Lock()
        graphs = CudaGraphCache(self.io, self._new_execution, record_on_cuda) if cuda_graphs else None
        self._calls = ContextPool(self.io, self.device, self._new_execution, graphs)

    def hold(self, tensors: Mapping[str, Tensor], *, fixed: bool = False) -> DeviceSlots:
        """Lay out slots (``ContextPool.hold``)."""
        with torch.cuda.device(self.device):
            return self._calls.hold(tensors, fixed=fixed)

    def call(self, inputs: Mapping[str, Tensor], slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one call (``ContextPool.call``)."""
        with torch.cuda.device(self.device):
            found = self._calls.call(inputs, slots)
            if self._config is not None:
                self._config.store(sum(execution.shape_changes for execution in self._calls.executions()))
        return found

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Allow writes to memory that calls read: wait for queued calls before the block, and for writes after it.

        The caller must block new calls.
        """
        self._calls.finish()
        with torch.cuda.device(self.device):
            try:
                yield
            finally:
                torch.cuda.current_stream().synchronize()

    def _new_execution(self) -> ExecutionSlot:
        """Make a new context on this device, regardless of the caller's current device."""
        with self._making, torch.cuda.device(self.device), collect_errors() as messages:
            config = () if self._config is None else (self._config.config,)
            context = self.engine.create_execution_context(*config)
            if context is None:
                raise Unavailable(
                    f"TensorRT has no memory to run the plan in: {messages.why()}",
                    next_step="free some of the GPU's memory, or compile for smaller sizes",
                )
            return ExecutionSlot(context, self.io, self.device, StreamQueue(self.device), self.library)


class _RuntimeConfig:
    """The settings with which TensorRT for RTX compiles a plan's kernels, and their cache.

    Kernels for the sizes of a call are compiled before its first run, and never while later calls run: a replaced
    kernel could round differently, and results would depend on earlier calls (invariant 1).

    Args:
        engine: TensorRT's engine.
        kernels: the cache entry of kernels compiled earlier; None to compile them in every process.
        library: TensorRT for RTX.
    """

    def __init__(self, engine: tensorrt.ICudaEngine, kernels: CachedFile | None, library: TensorRTLibrary) -> None:
        self.config = engine.create_runtime_config()
        strategies = library.module.DynamicShapesKernelSpecializationStrategy
        self.config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        self._cache = self.config.create_runtime_cache()
        self._kernels, self._next, self._lock = kernels, 1, threading.Lock()
        stored = None if kernels is None else kernels.read()
        with collect_errors() as messages:
            if stored is not None and not self._cache.deserialize(stored):
                messages.why()  # from another driver: kernels are compiled again, and replace the stored ones
        self.config.set_runtime_cache(self._cache)

    def store(self, shapes: int) -> None:
        """Store the compiled kernels whenever the number of shapes has doubled, until a write fails."""
        if self._kernels is None or shapes < self._next or not self._lock.acquire(blocking=False):
            return
        try:
            self._next = 2 * shapes
            if not self._kernels.write(memoryview(self._cache.serialize())):
                self._kernels = None
        finally:
            self._lock.release()


def set_streaming_budget(engine: CudaEngine, contexts: int) -> None:
    """Set the number of bytes of a plan's weights that stay on the GPU; it cannot change once there is a context.

    Args:
        engine: TensorRT's engine, without a context.
        contexts: the maximum number of contexts, each of which uses some of the memory that is free now.
    """
    if engine.streamable_weights_size > 0:
        engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
        room = engine.weight_streaming_budget_v2 - contexts * engine.device_memory_size_v2
        engine.weight_streaming_budget_v2 = max(0, room)
