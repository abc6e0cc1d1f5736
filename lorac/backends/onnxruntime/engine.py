"""The ONNX Runtime engine: a session per graph; a choice of adapters is a set of values for their slot inputs."""

import dataclasses
import functools
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from lorac.backends.onnx.engine import LoadedProgram, OnnxEngine, OnnxProgram, convert_inputs
from lorac.backends.onnxruntime.adapter_files import bound_tensors, merged_tensors
from lorac.backends.onnxruntime.devices.memory import as_ort_value, as_tensor, memory_at
from lorac.backends.onnxruntime.devices.providers import ops_on_cpu
from lorac.backends.onnxruntime.inference_session import TORCH_DTYPES, create_settled_session
from lorac.backends.onnxruntime.kv_cache import (
    CacheLayout,
    OrtCache,
    full_sequence_step,
    mask_name,
    run_decode_step,
    split_padding,
)
from lorac.backends.onnxruntime.options import FLOAT16, OnnxRuntimeOptions
from lorac.errors import Unavailable
from lorac.frontend.components import check_component, get_encoder_graph_name
from lorac.ir.algebra import operands
from lorac.ir.calls.call import Call
from lorac.ir.calls.interface import Interface
from lorac.ir.graph.attention_ops import LOGITS_TO_KEEP, PAST_LENGTHS, is_encoder_output
from lorac.ir.graph.feeds import convert_input, make_empty_cache, select_reached_plans
from lorac.ir.graph.graph import SlotInput
from lorac.ir.slots.buffers import FusedBuffer
from lorac.ir.slots.composition import ComposedWeights
from lorac.storage.onnx_adapter import write_onnx_adapter
from lorac.storage.tensor_file import write_safetensors
from lorac.target.engine import CallResult
from lorac.target.kv_cache import CacheSpec, DecodeStep, KeyValueCache

_BOUND_NOTE = (
    "merged weights are inputs, which ONNX Runtime does not prepack, and so slower token by token than constants: "
    "swap(..., settle=True) makes constants of a choice's"
)


class GraphSession:
    """One graph of the program: its session and its interface.

    Args:
        interface: its inputs and outputs.
        slots: its slot inputs by public name.

    Attributes:
        outputs: names of the session's outputs.
        dtypes: the dtype of every input; None for one that torch does not have.
        cache: the layout of its cache; None where it keeps none.
        narrow_slots: names of the slots in float16.
    """

    def __init__(self, session: ort.InferenceSession, interface: Interface, slots: Mapping[str, SlotInput]) -> None:
        self.session, self.interface, self.slots = session, interface, slots
        self.outputs = [output.name for output in session.get_outputs()]
        self.dtypes = {value.name: TORCH_DTYPES.get(value.type) for value in session.get_inputs()}
        self.cache = CacheLayout.of(session)
        values = (*session.get_inputs(), *session.get_overridable_initializers())
        self.narrow_slots = {value.name for value in values if value.name in slots and value.type == "tensor(float16)"}

    def read_encoder(self, encoder: "GraphSession") -> None:
        """Note which inputs of an encoder have to be given before the graph runs."""
        self.cache = CacheLayout.of(self.session, (*encoder.interface.inputs, *encoder.interface.constants))


class OrtEngine(OnnxEngine[GraphSession, OnnxRuntimeOptions]):
    """Runs a program, one session per graph."""

    target = "onnxruntime"

    def __init__(self, program: LoadedProgram[GraphSession, OnnxRuntimeOptions]) -> None:
        self.device_memory = memory_at(program.options.place)
        self._narrow_slots = frozenset[str]().union(*(graph.narrow_slots for graph in program.graphs.values()))
        super().__init__(program)
        for name, graph in self.graphs.items():
            if (encoder := self.graphs.get(get_encoder_graph_name(name))) is not None:
                graph.read_encoder(encoder)
            elif graph.cache is not None:  # a call gives tokens and their mask, whatever else the model takes
                tokens = graph.cache.token_input
                arguments = (tokens, mask_name(tokens))
                interface = dataclasses.replace(self.interfaces[name], arguments=arguments)
                self.interfaces = {**self.interfaces, name: interface}
        self.settles_in_background = self.fused and self.options.settle == "background"
        self._written_choice = ComposedWeights(())
        # Keyed weakly: constants that can never serve again are let go.
        self._settled: weakref.WeakKeyDictionary[ComposedWeights, Mapping[str, ort.InferenceSession]]
        self._settled = weakref.WeakKeyDictionary()
        self._written_bindings = SlotBindings()

    def bind_tensors(self, tensors: Mapping[str, Tensor]) -> "OrtProgram":
        """Bind tensors to all slots; one that lies where sessions read it is not copied.

        Raises:
            Unavailable: a value is too large for a slot in float16.
        """
        narrow = {name: _to_float16(name, tensor) for name, tensor in tensors.items() if name in self._narrow_slots}
        program = OrtProgram(self, {**tensors, **narrow})
        if self.device_memory.copies:  # now, instead of in the first call
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
        if not ops:
            return (*self._native_notes(graph), *mapped)
        listed = ", ".join(f"{op} ({count})" if count > 1 else op for op, count in ops.items())
        return (f"the CPU computes, inside each call on {graph.session.get_providers()[0]}: {listed}", *mapped)

    def _native_notes(self, graph: GraphSession) -> tuple[str, ...]:
        """Say whether the op of lorac-native adds low-rank adapters, if there may be any."""
        pairs = sum(slot.role == operands.A for slot in graph.slots.values())
        if not pairs or not self.options.may_use_native:
            return ()
        library, layers = self.options.native_library, graph.session.lorac_native_layers
        if library is None:
            return ('ONNX Runtime\'s own ops add adapters; pip install "lorac[native]" adds them by one op (faster)',)
        factors = ", factors in float16" if self.options.native == FLOAT16 else ""
        return (f"lorac-native adds the adapters of {layers} of {pairs} sites ({library.kernels}{factors})",)

    def record_written(self, snapshot: ComposedWeights) -> None:
        """Note which choice was written: constants that were made from it serve again."""
        self._written_choice = snapshot
        self.device_memory.written(self.memory)

    @property
    def is_settled(self) -> bool:
        return self._written_choice in self._settled

    def settle(self) -> None:
        """Make sessions with the active weights as constants, which ONNX Runtime prepacks.

        They serve calls for as long as those weights are active. Their results round differently from those of the
        bound weights, so they are a weight state of their own (invariant 1).

        Raises:
            Unavailable: no weight is bound.
        """
        snapshot = self._written_choice
        if not self.fused:
            raise Unavailable(
                "only bound weights can settle, and this program binds none", next_step="compile with mode='fused'"
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
        """ONNX Runtime's own, or that of values for every runtime; None without slots to fill."""
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
        """The folder of the program when it was opened; nothing is read from there any more."""
        name, file = next(iter(self.files.items()))
        return file.where.parents[name.count("/")]

    def outputs(self, graph: str, tensors: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return copies of a graph's outputs; without a past, a graph that keeps a cache reads an empty one."""
        cache = self.graphs[graph].cache
        if cache is not None and PAST_LENGTHS not in inputs:
            inputs = {**make_empty_cache(cache.shapes, inputs[cache.token_input], cache.encoder_outputs), **inputs}
        return super().outputs(graph, tensors, inputs)

    def cache_spec(self, graph: str) -> CacheSpec | None:
        layout = self.graphs[check_component(graph, self.graphs)].cache
        return None if layout is None else layout.spec

    def new_cache(self, graph: str, rows: int, capacity: int) -> KeyValueCache:
        layout = self.graphs[check_component(graph, self.graphs)].cache
        return (
            super().new_cache(graph, rows, capacity)
            if layout is None
            else OrtCache(layout, rows, capacity, self.memory_budget)
        )


class SlotBindings(threading.local):
    """The IOBindings of this thread with the slots of a choice bound, by graph, each with its session."""

    def __init__(self) -> None:
        self.by_graph: dict[str, tuple[weakref.ref[ort.InferenceSession], ort.IOBinding]] = {}


@dataclass(frozen=True, eq=False)
class OrtProgram(OnnxProgram):
    """The program with values for its slot inputs.

    Attributes:
        bindings: never shared between threads.
        settled: the sessions in which the slots are constants, by graph; None where they are bound.
    """

    engine: OrtEngine
    bindings: SlotBindings = field(default_factory=SlotBindings)
    settled: Mapping[str, ort.InferenceSession] | None = None

    @functools.cached_property
    def values(self) -> Mapping[str, ort.OrtValue]:
        """Slot input -> OrtValue in the memory that sessions read."""
        return {name: self.engine.device_memory.to_value(tensor) for name, tensor in self.tensors.items()}

    def run(self, graph: str, call: Call) -> CallResult:
        """Call a graph; one with a cache takes whole sequences, and stores nothing."""
        loaded = self.engine.graphs[graph]
        return super().run(graph, call) if loaded.cache is None else self._run_whole(graph, loaded, loaded.cache, call)

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

    def decode(self, graph: str, cache: KeyValueCache, step: DecodeStep) -> Tensor:
        assert isinstance(cache, OrtCache)
        loaded = self.engine.graphs[graph]
        session = loaded.session if self.settled is None else self.settled[graph]
        return run_decode_step(session, self.bindings, cache, step, lambda: self._new_binding(loaded, session))

    def compute_features(self, graph: str, inputs: Mapping[str, object]) -> Tensor:
        name = get_encoder_graph_name(graph)
        tower = self.engine.graphs[name]
        return self.run_graph(name, convert_inputs(tower, tower.interface.check(tower.interface.bind((), inputs))))[0]

    def encode(self, graph: str, cache: KeyValueCache, inputs: Mapping[str, object]) -> None:
        self._encode(graph, cache, Call(kwargs=inputs))

    def _new_binding(self, loaded: GraphSession, session: ort.InferenceSession) -> ort.IOBinding:
        """Return a new IOBinding of a graph with its slots bound, unless they are constants of the session."""
        binding = session.io_binding()
        if session is loaded.session:
            for name in loaded.slots.keys() & self.values.keys():
                binding.bind_ortvalue_input(name, self.values[name])
        return binding

    def _encode(self, graph: str, cache: KeyValueCache, call: Call) -> dict[str, Tensor]:
        """Encode as ``encode`` does; return the encoder's outputs that the model answers too, by name."""
        assert isinstance(cache, OrtCache)
        name = get_encoder_graph_name(graph)
        encoder = self.engine.graphs[name]
        outputs = self.run_graph(name, convert_inputs(encoder, encoder.interface.check(call)))
        named = dict(zip(encoder.outputs, outputs, strict=True))
        cache.set_encoder_outputs({name: value for name, value in named.items() if is_encoder_output(name)})
        return {name: value for name, value in named.items() if not is_encoder_output(name)}

    def _run_whole(self, graph: str, loaded: GraphSession, layout: CacheLayout, call: Call) -> CallResult:
        """Call a graph that keeps a cache with whole sequences: over a cache of this call alone."""
        tokens, interface = layout.token_input, loaded.interface
        encoded = Call(kwargs={name: call.kwargs[name] for name in layout.spec.encodes if name in call.kwargs})
        given, counts = split_padding({n: v for n, v in call.kwargs.items() if n not in encoded.kwargs}, tokens)
        ids = convert_input(tokens, given[tokens], loaded.dtypes[tokens])
        layout.check_length(max(counts, default=0) + self.virtual_tokens)
        step = full_sequence_step(ids, counts)
        positions = {LOGITS_TO_KEEP: step.wanted} if LOGITS_TO_KEEP in loaded.dtypes else {}
        interface.check(Call(kwargs={**given, **positions}))
        cache = self.new_cache(graph, *ids.shape)
        answered = self._encode(graph, cache, encoded) if layout.spec.encodes else {}
        logits = self.decode(graph, cache, step)
        logits[torch.arange(ids.shape[1]) >= torch.tensor(counts)[:, None]] = 0
        as_numpy = isinstance(given[tokens], np.ndarray)
        outputs: list[object] = [logits.numpy() if as_numpy else logits, *(None for _ in interface.extra_outputs)]
        answered_outputs = {name: value.numpy() if as_numpy else value for name, value in answered.items()}
        output, _ = interface.with_values(answered_outputs).build_output(outputs, as_tuple=call.wants_tuple)
        return CallResult(output)


def _to_float16(name: str, tensor: Tensor) -> Tensor:
    """Return a slot's tensor in float16."""
    if tensor.dtype == torch.float16:
        return tensor
    narrow = tensor.half()
    if not narrow.isfinite().all():
        raise Unavailable(
            f"'{name}' has values beyond {torch.finfo(torch.float16).max:.0f}, the largest of float16",
            next_step="native=True keeps factors in float32",
        )
    return narrow
