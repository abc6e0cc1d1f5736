"""The ONNX Runtime engine: a session per graph; a choice of adapters is a set of values for slot inputs."""

import functools
import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from torch import Tensor

from lorac.backends.onnx.caching_engine import CachingEngine, CachingProgram
from lorac.backends.onnx.kv_cache import BufferedCache, CacheLayout
from lorac.backends.onnx.model_files import MAX_LENGTH_KEY
from lorac.backends.onnxruntime.devices.memory import as_ort_value, as_tensor, memory_at
from lorac.backends.onnxruntime.devices.providers import ops_on_cpu
from lorac.backends.onnxruntime.inference_session import TORCH_DTYPES, create_settled_session
from lorac.backends.onnxruntime.options import FLOAT16, OnnxRuntimeOptions
from lorac.errors import Unavailable
from lorac.frontend.components import check_component
from lorac.ir.algebra import operands
from lorac.ir.calls.interface import Interface
from lorac.ir.graph.attention_ops import present_name
from lorac.ir.graph.feeds import CacheInputShape, collect_slot_tensors, select_reached_plans
from lorac.ir.graph.graph import SlotInput
from lorac.ir.sites.site import BaseReader
from lorac.ir.slots.buffers import FusedBuffer, make_fused_buffers
from lorac.ir.slots.composition import ComposedWeights, fill_slots
from lorac.ir.slots.plans import SitePlan
from lorac.storage.onnx_adapter import write_onnx_adapter
from lorac.storage.tensor_file import write_safetensors
from lorac.target.placed_engine import LoadedProgram

_BOUND_NOTE = (
    "merged weights are inputs, which ONNX Runtime does not prepack, so tokens take longer than with constants: "
    "swap(..., settle=True) makes constants of the choice's weights"
)


class GraphSession:
    """One graph of the program: its session and its interface.

    Args:
        interface: its inputs and outputs.
        slots: its slot inputs, by public name.

    Attributes:
        outputs: the names of the session's outputs.
        dtypes: the dtype of every input; None for a dtype that torch lacks.
        cache: the layout of its cache; None if it has no cache.
        narrow_slots: the names of the slots in float16.
    """

    def __init__(self, session: ort.InferenceSession, interface: Interface, slots: Mapping[str, SlotInput]) -> None:
        self.session, self.interface, self.slots = session, interface, slots
        self.outputs = [output.name for output in session.get_outputs()]
        self.dtypes = {value.name: TORCH_DTYPES.get(value.type) for value in session.get_inputs()}
        longest = session.get_modelmeta().custom_metadata_map.get(MAX_LENGTH_KEY)
        self.cache = CacheLayout.of(_shapes_of(session.get_inputs()), _shapes_of(session.get_outputs()), longest)
        values = (*session.get_inputs(), *session.get_overridable_initializers())
        self.narrow_slots = {value.name for value in values if value.name in slots and value.type == "tensor(float16)"}


class OrtEngine(CachingEngine[GraphSession, OnnxRuntimeOptions]):
    """An engine of one session per graph."""

    target = "onnxruntime"

    def __init__(self, program: LoadedProgram[GraphSession, OnnxRuntimeOptions]) -> None:
        self.device_memory = memory_at(program.options.place)
        self._narrow_slots = frozenset[str]().union(*(graph.narrow_slots for graph in program.graphs.values()))
        super().__init__(program)
        self.settles_in_background = self.fused and self.options.settle == "background"
        self._written_choice = ComposedWeights(())
        # Weak keys: sessions whose weights can never become active again are released.
        self._settled: weakref.WeakKeyDictionary[ComposedWeights, Mapping[str, ort.InferenceSession]]
        self._settled = weakref.WeakKeyDictionary()
        self._written_bindings = SlotBindings()

    def bind_tensors(self, tensors: Mapping[str, Tensor]) -> "OrtProgram":
        """Bind tensors to all slots; a tensor in memory that sessions read is not copied.

        Raises:
            Unavailable: a value is too large for a slot in float16.
        """
        narrow = {name: tensor.half() for name, tensor in tensors.items() if name in self._narrow_slots}
        for name in [name for name, tensor in narrow.items() if tensor is not tensors[name]]:
            if not narrow[name].isfinite().all():
                raise Unavailable(
                    f"'{name}' has values beyond {torch.finfo(torch.float16).max:.0f}, the largest of float16",
                    next_step="native=True keeps factors in float32",
                )
        program = OrtProgram(self, {**tensors, **narrow})
        if self.device_memory.copies:  # copy now, instead of in the first call
            _ = program.values
        return program

    @property
    def written_program(self) -> "OrtProgram":
        return OrtProgram(self, self.memory, self._written_bindings, self._settled.get(self._written_choice))

    def allocate_weights(self) -> tuple[dict[str, FusedBuffer], dict[str, Tensor]]:
        return self.device_memory.fused(self.plans, self.base)

    def machine_notes(self, graph: GraphSession) -> tuple[str, ...]:
        """Describe how this machine runs a graph: ops of a GPU on the CPU, bound or mapped weights, adapters' op."""
        mapped = (f"prepacked weights are mapped from '{self.options.prepacked}'",) * graph.session.lorac_prepacked
        if self.fused and graph.slots and self.options.place.type == "cpu" and self.options.settle == "asked":
            return (_BOUND_NOTE, *mapped)
        ops = ops_on_cpu(graph.session)
        if ops:
            listed = ", ".join(f"{op} ({count})" if count > 1 else op for op, count in ops.items())
            return (f"the CPU computes, inside each call on {graph.session.get_providers()[0]}: {listed}", *mapped)
        pairs = sum(slot.role == operands.A for slot in graph.slots.values())
        if not pairs or not self.options.may_use_native:
            return mapped
        library, layers = self.options.native_library, graph.session.lorac_native_layers
        if library is None:
            note = 'ONNX Runtime\'s own ops add adapters; pip install "lorac[native]" adds them by one op (faster)'
        else:
            factors = ", factors in float16" if self.options.native == FLOAT16 else ""
            note = f"lorac-native adds the adapters of {layers} of {pairs} sites ({library.kernels}{factors})"
        return (note, *mapped)

    def record_written(self, snapshot: ComposedWeights) -> None:
        """Record the choice that was written; settled sessions with its weights apply again."""
        self._written_choice = snapshot
        self.device_memory.written(self.memory)

    @property
    def is_settled(self) -> bool:
        return self._written_choice in self._settled

    def settle(self) -> None:
        """Create sessions with the active weights as constants, which ONNX Runtime prepacks.

        Calls use them as long as those weights are active. Their results round differently from those of bound weights,
        so they count as a separate weight state (invariant 1).

        Raises:
            Unavailable: the program has no bound weights.
        """
        snapshot = self._written_choice
        if not self.fused:
            raise Unavailable(
                "only merged weights that are inputs can settle, and this program has none",
                next_step="compile with mode='fused'",
            )
        if snapshot in self._settled:
            return
        sessions = {}
        for name, graph in self.graphs.items():
            constants = {slot: self.memory[slot] for slot in graph.slots if slot in self.memory}
            sessions[name] = (
                create_settled_session(self.files, name, constants, self.options) if constants else graph.session
            )
        if self._written_choice is snapshot:
            self._settled[snapshot] = sessions

    @property
    def choice_suffix(self) -> str | None:
        """The suffix of ONNX Runtime's adapter files, or of files for every runtime; None without slots to fill."""
        own = ".slots.safetensors" if self.options.portable else ".onnx_adapter"
        return own if self.slots and not self.constant else None

    def write_choice(self, snapshot: ComposedWeights, graph: str, path: Path) -> None:
        """Write an ``.onnx_adapter``, or the same tensors as safetensors."""
        slots = self.graphs[check_component(graph, self.graphs)].slots
        if self.fused:
            tensors = merged_tensors(select_reached_plans(slots, self.plans), self.base, snapshot)
        else:
            tensors = bound_tensors(slots, self.plans, self.base, snapshot)
        if self.options.portable:
            write_safetensors(path, tensors, {})
        else:
            write_onnx_adapter(path, tensors)

    @property
    def folder(self) -> Path:
        """The program's folder at the time it was opened; nothing is read from it any more."""
        name, file = next(iter(self.files.items()))
        return file.where.parents[name.count("/")]


_StepBinding = tuple[ort.IOBinding, dict[str, Tensor]]
"""A binding of a cache's buffers, and the small inputs that are bound to it."""


class SlotBindings(threading.local):
    """This thread's IOBindings with a choice's slots bound, by graph, each with its session."""

    def __init__(self) -> None:
        self.by_graph: dict[str, tuple[weakref.ref[ort.InferenceSession], ort.IOBinding]] = {}


@dataclass(frozen=True, eq=False)
class OrtProgram(CachingProgram):
    """The program with values for its slot inputs.

    Attributes:
        bindings: IOBindings, which threads never share.
        settled: the sessions with slots as constants, by graph; None if slots are bound.
    """

    engine: OrtEngine
    bindings: SlotBindings = field(default_factory=SlotBindings)
    settled: Mapping[str, ort.InferenceSession] | None = None

    @functools.cached_property
    def values(self) -> Mapping[str, ort.OrtValue]:
        """Slot input -> OrtValue in the memory that sessions read."""
        return {name: self.engine.device_memory.to_value(tensor) for name, tensor in self.tensors.items()}

    def run_graph(self, graph: str, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        loaded, memory, bindings = self.engine.graphs[graph], self.engine.device_memory, self.bindings.by_graph
        session = loaded.session if self.settled is None else self.settled[graph]
        if graph not in bindings or bindings[graph][0]() is not session:
            bindings[graph] = (weakref.ref(session), self._new_binding(loaded, session))
        binding = bindings[graph][1]
        for name, tensor in inputs.items():
            binding.bind_ortvalue_input(name, as_ort_value(tensor))
        binding.clear_binding_outputs()
        device = memory.output_device(inputs.values())
        for name in loaded.outputs:
            binding.bind_output(name, *device)
        memory.synchronize()
        session.run_with_iobinding(binding)
        outputs = [as_tensor(value) for value in binding.get_outputs()]
        binding.clear_binding_outputs()
        return outputs

    def run_step(
        self, graph: str, cache: BufferedCache[Any], inputs: Mapping[str, Tensor], output: str, logits: Tensor
    ) -> None:
        loaded = self.engine.graphs[graph]
        session = loaded.session if self.settled is None else self.settled[graph]

        def bind(new: _StepBinding, buffers: Mapping[str, Tensor], encoded: Mapping[str, Tensor]) -> None:
            binding, _ = new
            for past, buffer in buffers.items():  # a session reads and writes them
                value = as_ort_value(buffer)
                binding.bind_ortvalue_input(past, value)
                binding.bind_ortvalue_output(present_name(past), value)
            for name, tensor in encoded.items():
                binding.bind_ortvalue_input(name, as_ort_value(tensor))

        binding, bound = cache.binding(session, self.bindings, lambda: (self._new_binding(loaded, session), {}), bind)
        for name, tensor in inputs.items():
            if bound.get(name) is not tensor:
                binding.bind_ortvalue_input(name, as_ort_value(tensor))
                bound[name] = tensor
        binding.bind_ortvalue_output(output, as_ort_value(logits))
        session.run_with_iobinding(binding)

    def _new_binding(self, loaded: GraphSession, session: ort.InferenceSession) -> ort.IOBinding:
        """Return a new IOBinding of a graph with slots bound, unless they are constants of the session."""
        binding = session.io_binding()
        if session is loaded.session:
            for name in loaded.slots.keys() & self.values.keys():
                binding.bind_ortvalue_input(name, self.values[name])
        return binding


def _shapes_of(values: Iterable[ort.NodeArg]) -> dict[str, CacheInputShape]:
    """Return the sizes of inputs or outputs, with None for dynamic ones, and their dtypes."""
    return {
        value.name: (tuple(size if isinstance(size, int) else None for size in value.shape), TORCH_DTYPES[value.type])
        for value in values
        if value.type in TORCH_DTYPES
    }


def bound_tensors(
    inputs: Mapping[str, SlotInput], plans: Mapping[str, SitePlan], base: BaseReader, snapshot: ComposedWeights
) -> dict[str, Tensor]:
    """Return the tensors that a choice binds to slots, where these differ from the slots' defaults, the base's content.

    ONNX Runtime's adapter files contain them by the names of a model's inputs. Two files at once could set one input
    twice, so a mixture is written as a single file.
    """
    changed = {name: slot for name, slot in inputs.items() if snapshot.composed.keys() & {slot.site, *slot.members}}
    sites = {path: plans[path] for slot in changed.values() for path in (slot.site, *slot.members) if path in plans}
    bound = collect_slot_tensors(changed, sites, fill_slots(sites, snapshot, base))
    idle = collect_slot_tensors(changed, sites, fill_slots(sites, ComposedWeights(()), base))
    return {name: tensor for name, tensor in bound.items() if not torch.equal(tensor, idle[name])}


def merged_tensors(plans: Mapping[str, SitePlan], base: BaseReader, snapshot: ComposedWeights) -> dict[str, Tensor]:
    """Return the weights that a choice changes, bit by bit as an engine's memory has them."""
    changed: dict[str, Tensor] = {}
    for path in snapshot.composed.keys() & plans.keys():  # one site at a time: copies of all weights would be large
        buffers, memory = make_fused_buffers({path: plans[path]}, base)
        before = {name: tensor.clone() for name, tensor in memory.items()}
        for buffer in buffers.values():
            buffer.write(snapshot.composed[path].change)
        changed |= {name: tensor for name, tensor in memory.items() if not torch.equal(tensor, before[name])}
    return changed
