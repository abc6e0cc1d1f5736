"""The ONNX Runtime engine: a session per graph; a choice of adapters is a set of values for their slot inputs."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
import torch

from lorac.backends.onnxruntime.adapter_files import bound_tensors, merged_tensors, write_adapter_file
from lorac.backends.onnxruntime.devices.memory import as_ort_value, as_tensor, memory_at
from lorac.backends.onnxruntime.devices.providers import ops_on_cpu
from lorac.backends.onnxruntime.inputs import session_inputs
from lorac.backends.onnxruntime.kv_cache import (
    CacheLayout,
    OrtCache,
    check_encoder_rows,
    full_sequence_step,
    run_decode_step,
    split_padding,
)
from lorac.backends.onnxruntime.options import OnnxRuntimeOptions
from lorac.backends.onnxruntime.settling import create_frozen_session
from lorac.errors import Unavailable
from lorac.frontend.components import check_component, get_encoder_graph_name
from lorac.ir.graph.attention_ops import LOGITS_TO_KEEP, PAST_LENGTHS, is_encoder_output
from lorac.ir.graph.feeds import collect_slot_tensors, group_aux_outputs, make_empty_cache, select_reached_plans
from lorac.ir.graph.graph import SlotInput
from lorac.ir.interface import Interface
from lorac.ir.sites import BaseReader
from lorac.ir.slots.composition import ComposedWeights
from lorac.ir.slots.plans import SitePlan, SiteSlots
from lorac.target.engine import BoundProgram, CallResult, Engine, ProgramFiles
from lorac.target.kv_cache import CacheSpec, DecodeStep, KeyValueCache

if TYPE_CHECKING:
    from lorac.report.dump import Dump

Tensor = torch.Tensor


class GraphSession:
    """One graph of the program: its session, and how it is called.

    Args:
        session: the session.
        signature: how the graph's host is called.
        slots: its slot inputs by public name.
    """

    def __init__(self, session: ort.InferenceSession, signature: Interface, slots: Mapping[str, SlotInput]) -> None:
        self.session, self.signature, self.slots = session, signature, slots
        self.outputs = [output.name for output in session.get_outputs()]
        self.wanted = session_inputs(session)
        self.cache = CacheLayout.of(session)

    def behind(self, encoder: GraphSession) -> None:
        """Have it read what an encoder makes."""
        self.cache = CacheLayout.of(self.session, encoder.signature.inputs)


@dataclass(eq=False)
class SlotValues:
    """Values for every slot input.

    Attributes:
        values: slot input -> OrtValue where sessions read it.
        tensors: the tensors that it was made of, kept alive as long as the binding.
        own: per thread: graph -> an IOBinding with its slots bound; made on a thread's first call, never shared.
    """

    values: Mapping[str, ort.OrtValue]
    tensors: Mapping[str, Tensor]
    own: threading.local = field(default_factory=threading.local)


class OrtEngine(Engine[SlotValues]):
    """Runs a program, one session per graph.

    Args:
        parts: graph name -> its session.
        plans: slots of every site.
        base: reads base weights without the host.
        mode: ``"live"``, ``"fused"`` or ``"baked"``.
        files: the emitted program and the base weights, held.
        options: the target's options.
    """

    target = "onnxruntime"
    files: ProgramFiles

    def __init__(
        self,
        *,
        parts: Mapping[str, GraphSession],
        plans: Mapping[str, SitePlan],
        base: BaseReader,
        mode: str,
        files: ProgramFiles,
        options: OnnxRuntimeOptions,
    ) -> None:
        self.parts = parts
        for name, part in parts.items():
            if (encoder := parts.get(get_encoder_graph_name(name))) is not None:
                part.behind(encoder)
        self.slots = {name: slot for part in parts.values() for name, slot in part.slots.items()}
        self.interfaces = {name: _signature_with_notes(part) for name, part in parts.items()}
        self.plans = select_reached_plans(self.slots, plans)
        self.base, self.mode, self.files, self.options = base, mode, files, options
        self.freezes_in_background = self.fused and options.settle == "background"
        self.where = memory_at(options.place)
        self.buffers, self.memory = self.where.fused(self.plans, base) if self.fused else ({}, {})
        self._written = self._values(self.memory)
        self._holds = ComposedWeights(())
        # By snapshot, weakly: constants that can never serve again are let go.
        self._settled: weakref.WeakKeyDictionary[ComposedWeights, _FrozenSessions] = weakref.WeakKeyDictionary()

    # --- the engine's contract ---------------------------------------------------------------------------------

    def bind(self, snapshot: ComposedWeights, slots: Mapping[str, SiteSlots]) -> BoundProgram[SlotValues]:
        """OrtValues over the slots' tensors; what lies where sessions read it is not copied."""
        tensors = {} if self.constant else collect_slot_tensors(self.slots, self.plans, slots)
        return BoundProgram(self, self._values(tensors))

    @property
    def written_program(self) -> BoundProgram[SlotValues]:
        """The buffers that weights are written to."""
        return BoundProgram(self, self._written)

    def dump(self) -> dict[str, Dump]:
        """The models that the sessions were made of."""
        from lorac.backends.onnx.model_dump import dump_model  # what a call does not need

        return {name: dump_model(self.files, name, part.slots) for name, part in self.parts.items()}

    def activate(self, content: SlotValues) -> None:
        """Nothing: every call names its binding."""

    def record_written(self, snapshot: ComposedWeights) -> None:
        """Remember it: constants that were made of it serve again."""
        self._holds = snapshot
        self.where.written(self.memory)

    def freeze(self) -> None:
        """Make sessions with the present weights as constants; they serve calls while those are the active ones.

        Raises:
            Unavailable: no weight is bound.
        """
        snapshot = self._holds
        if not self.fused:
            raise Unavailable(
                "only bound weights can settle, and this program binds none",
                next_step="compile with mode='fused'",
            )
        if snapshot in self._settled:
            return
        sessions = {name: self._with_constants(name, part) for name, part in self.parts.items()}
        if self._holds is snapshot:
            self._settled[snapshot] = _FrozenSessions(sessions, self._values({}))

    @property
    def constant(self) -> bool:
        """A baked program's adapters are constants."""
        return self.mode == "baked"

    @property
    def portable(self) -> bool:
        """Whether there are slots to fill."""
        return bool(self.slots) and not self.constant

    def write_choice(self, snapshot: ComposedWeights, graph: str, path: Path) -> None:
        """An ``.onnx_adapter``."""
        slots = self.parts[check_component(graph, self.parts)].slots
        if self.fused:
            tensors = merged_tensors(select_reached_plans(slots, self.plans), self.base, snapshot)
        else:
            tensors = bound_tensors(slots, self.plans, self.base, snapshot)
        write_adapter_file(path, tensors)

    def _with_constants(self, name: str, part: GraphSession) -> ort.InferenceSession:
        constants = {slot: self.memory[slot] for slot in part.slots if slot in self.memory}
        if not constants:
            return part.session
        return create_frozen_session(self.files, name, constants, self.options)

    @property
    def folder(self) -> Path:
        """Where the program lay when it was opened; nothing is read from there any more."""
        name, held = next(iter(self.files.items()))
        return held.where.parents[name.count("/")]

    @property
    def is_frozen(self) -> bool:
        """Whether calls run on constants now."""
        return self._holds in self._settled

    # --- calls -------------------------------------------------------------------------------------------------

    def call(
        self, content: SlotValues, graph: str, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> CallResult:
        """One call of a graph with a binding."""
        part = self.parts[check_component(graph, self.parts)]
        if part.cache is not None:
            return self._call_over_texts(content, graph, part, args, kwargs)
        session, values = self._serving(part, graph, content)

        def run(given: dict[str, Any]) -> list[Any]:
            as_numpy = all(isinstance(v, np.ndarray) for v in given.values())
            return [_to_output(value, as_numpy) for value in self._execute(part, graph, session, values, given)]

        output, extra = part.signature.run(args, kwargs, run)
        return CallResult(output, group_aux_outputs(extra, values.tensors))

    def cache_spec(self, graph: str) -> CacheSpec | None:
        """As its session says."""
        layout = self.parts[check_component(graph, self.parts)].cache
        return None if layout is None else layout.keeps

    def new_cache(self, graph: str, rows: int, capacity: int) -> KeyValueCache:
        """Buffers that the session reads and writes."""
        layout = self.parts[check_component(graph, self.parts)].cache
        return super().new_cache(graph, rows, capacity) if layout is None else OrtCache(layout, rows, capacity)

    def decode(self, content: SlotValues, graph: str, cache: KeyValueCache, extension: DecodeStep) -> Tensor:
        """One run of the graph's session."""
        assert isinstance(cache, OrtCache)
        part = self.parts[graph]
        session, values = self._serving(part, graph, content)
        return run_decode_step(session, values, cache, extension, lambda: _new_binding(part, session, values))

    def encode(self, content: SlotValues, graph: str, cache: KeyValueCache, inputs: Mapping[str, object]) -> None:
        """One run of the session of the graph's encoder."""
        self._encoded(content, graph, cache, inputs)

    def _encoded(
        self, content: SlotValues, graph: str, cache: KeyValueCache, inputs: Mapping[str, object]
    ) -> dict[str, torch.Tensor]:
        """As ``encode``; returns what of the encoder's answer the host answers too, by name."""
        assert isinstance(cache, OrtCache)
        name = get_encoder_graph_name(graph)
        part = self.parts[name]
        given = part.signature.check((), inputs)
        session, values = self._serving(part, name, content)
        found = [as_tensor(value) for value in self._execute(part, name, session, values, given)]
        answered = dict(zip(part.outputs, found, strict=True))
        memory = {made: value for made, value in answered.items() if is_encoder_output(made)}
        check_encoder_rows(memory, len(cache.lengths))
        cache.remember(memory)
        return {made: value for made, value in answered.items() if made not in memory}

    def _call_over_texts(
        self,
        content: SlotValues,
        graph: str,
        part: GraphSession,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
    ) -> CallResult:
        """A plain call of a graph that keeps a cache: whole texts, of which nothing is kept."""
        assert part.cache is not None
        text, inputs = part.cache.text, dict[str, Any]()
        if part.cache.keeps.encodes:
            named = part.signature.name_arguments(args, kwargs)
            inputs = {name: named.pop(name) for name in part.cache.keeps.encodes if name in named}
            args, kwargs = (), named
        told, counts = split_padding(args, kwargs, text)
        ids = part.wanted[text].fit(told[text])
        part.cache.refuse_longer(max(counts, default=0))
        extension = full_sequence_step(ids, counts)
        picked = {LOGITS_TO_KEEP: extension.wanted} if LOGITS_TO_KEEP in part.wanted else {}
        part.signature.check((), {**told, **picked})
        cache = self.new_cache(graph, *ids.shape)
        encoded = self._encoded(content, graph, cache, inputs) if part.cache.keeps.encodes else {}
        logits = self.decode(content, graph, cache, extension)
        logits[torch.arange(ids.shape[1]) >= torch.tensor(counts)[:, None]] = 0
        as_numpy = isinstance(told[text], np.ndarray)
        answered: list[Any] = [logits.numpy() if as_numpy else logits]
        elsewhere = {name: value.numpy() if as_numpy else value for name, value in encoded.items()}
        rest = (None for _ in part.signature.extra_outputs)
        output, _ = part.signature.with_values(elsewhere).build_output([*answered, *rest], kwargs)
        return CallResult(output)

    def outputs(self, graph: str, tensors: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """A graph's outputs as it gives them, copied, for tensors in its slots and inputs by name."""
        part = self.parts[graph]
        if part.cache is not None and PAST_LENGTHS not in inputs:
            inputs = {**make_empty_cache(part.cache.shapes, inputs[part.cache.text], part.cache.memory), **inputs}
        values = self._execute(part, graph, part.session, self._values(tensors), inputs)
        return [as_tensor(value).clone() for value in values]

    def _values(self, tensors: Mapping[str, Tensor]) -> SlotValues:
        """What is bound for slot name -> tensor."""
        return SlotValues({name: self.where.held(tensor) for name, tensor in tensors.items()}, tensors)

    def _execute(
        self,
        part: GraphSession,
        graph: str,
        session: ort.InferenceSession,
        values: SlotValues,
        given: Mapping[str, Any],
    ) -> Sequence[ort.OrtValue]:
        io = _thread_binding(part, graph, session, values)
        held = {name: part.wanted[name].fit(value) for name, value in given.items()}
        for name, tensor in held.items():
            io.bind_ortvalue_input(name, as_ort_value(tensor))
        io.clear_binding_outputs()
        answered = self.where.answers(held.values())
        for name in part.outputs:
            io.bind_output(name, *answered)
        self.where.settled()
        session.run_with_iobinding(io)
        outputs: Sequence[ort.OrtValue] = io.get_outputs()
        io.clear_binding_outputs()
        return outputs

    def _serving(self, part: GraphSession, graph: str, values: SlotValues) -> tuple[ort.InferenceSession, SlotValues]:
        settled = self._settled.get(self._holds) if values is self._written else None
        return (part.session, values) if settled is None else (settled.sessions[graph], settled.values)


@dataclass(frozen=True, eq=False)
class _FrozenSessions:
    """Sessions with constants by graph, and the values that are left to bind: none."""

    sessions: Mapping[str, ort.InferenceSession]
    values: SlotValues


def _signature_with_notes(part: GraphSession) -> Interface:
    """How a graph is called, with what its session has the CPU compute; another machine's may have it otherwise."""
    there = ops_on_cpu(part.session)
    if not there:
        return part.signature
    told = ", ".join(f"{op} ({count})" if count > 1 else op for op, count in there.items())
    note = f"the CPU computes, inside each call on {part.session.get_providers()[0]}: {told}"
    return part.signature.with_notes(note)


def _thread_binding(part: GraphSession, graph: str, session: ort.InferenceSession, values: SlotValues) -> Any:
    """This thread's IOBinding of a graph with its slots bound."""
    owned: dict[str, Any] = vars(values.own).setdefault("io", {})
    if graph in owned and owned[graph][0]() is session:
        return owned[graph][1]
    io = _new_binding(part, session, values)
    owned[graph] = (weakref.ref(session), io)
    return io


def _new_binding(part: GraphSession, session: ort.InferenceSession, values: SlotValues) -> Any:
    """A new IOBinding of a graph with its slots bound."""
    io = session.io_binding()
    for name in part.slots.keys() & values.values.keys():
        io.bind_ortvalue_input(name, values.values[name])
    return io


def _to_output(value: ort.OrtValue, as_numpy: bool) -> Any:
    tensor = as_tensor(value)
    if not as_numpy:
        return tensor
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()  # NumPy has nothing for it
