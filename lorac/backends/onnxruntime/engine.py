"""The ONNX Runtime engine: a session per graph; a choice of adapters is a set of values for their slot inputs."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
import torch

from lorac.backends.onnxruntime.devices.memory import aliased, memory_at, taken
from lorac.backends.onnxruntime.devices.providers import on_cpu
from lorac.backends.onnxruntime.growing import Layout, OrtCache, all_tokens, extend, refuse_other_rows, whole_texts
from lorac.backends.onnxruntime.inputs import wanted
from lorac.backends.onnxruntime.options import Options
from lorac.backends.onnxruntime.portable import bound_tensors, write_choice, written_tensors
from lorac.backends.onnxruntime.settling import settled_session
from lorac.errors import Unavailable
from lorac.ir.binding import Answer, Binding
from lorac.ir.cache import Cache, Extension, Keeps
from lorac.ir.engine import Engine, Files
from lorac.ir.graph.attending import PAST, PLACES, is_memory
from lorac.ir.graph.feeds import empty_cache, fed, grouped_aux, named_tensors
from lorac.ir.graph.graph import SlotInput
from lorac.ir.graph.signature import CallSignature
from lorac.ir.host.components import encoder_of, require_component
from lorac.ir.host.sites import BaseReader
from lorac.ir.slots.site import SitePlan, SiteSlots
from lorac.ir.slots.snapshot import Snapshot

if TYPE_CHECKING:
    from lorac.ir.view.dump import Dump

Tensor = torch.Tensor


class GraphSession:
    """One graph of the program: its session, and how it is called.

    Args:
        session: the session.
        signature: how the graph's host is called.
        slots: its slot inputs by public name.
    """

    def __init__(self, session: ort.InferenceSession, signature: CallSignature, slots: Mapping[str, SlotInput]) -> None:
        self.session, self.signature, self.slots = session, signature, slots
        self.outputs = [output.name for output in session.get_outputs()]
        self.wanted = wanted(session)
        self.cache = Layout.of(session)

    def behind(self, encoder: GraphSession) -> None:
        """Have it read what an encoder makes."""
        self.cache = Layout.of(self.session, encoder.signature.inputs)


@dataclass(eq=False)
class Values:
    """Values for every slot input.

    Attributes:
        values: slot input -> OrtValue where sessions read it.
        tensors: the tensors that it was made of, kept alive as long as the binding.
        own: per thread: graph -> an IOBinding with its slots bound; made on a thread's first call, never shared.
    """

    values: Mapping[str, ort.OrtValue]
    tensors: Mapping[str, Tensor]
    own: threading.local = field(default_factory=threading.local)


class OrtEngine(Engine):
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
    files: Files

    def __init__(
        self,
        *,
        parts: Mapping[str, GraphSession],
        plans: Mapping[str, SitePlan],
        base: BaseReader,
        mode: str,
        files: Files,
        options: Options,
    ) -> None:
        self.parts = parts
        for name, part in parts.items():
            if (encoder := parts.get(encoder_of(name))) is not None:
                part.behind(encoder)
        self.slots = {name: slot for part in parts.values() for name, slot in part.slots.items()}
        self.signatures = {name: _telling(part) for name, part in parts.items()}
        self.plans = fed(self.slots, plans)
        self.base, self.mode, self.files, self.options = base, mode, files, options
        self.settles_alone = self.fused and options.settle == "background"
        self.where = memory_at(options.place)
        self.buffers, self.memory = self.where.fused(self.plans, base) if self.fused else ({}, {})
        self._written = self._values(self.memory)
        self._holds = Snapshot(())
        # By snapshot, weakly: constants that can never serve again are let go.
        self._settled: weakref.WeakKeyDictionary[Snapshot, _Settled] = weakref.WeakKeyDictionary()

    # --- the engine's contract ---------------------------------------------------------------------------------

    def bind(self, snapshot: Snapshot, slots: Mapping[str, SiteSlots]) -> Binding[Values]:
        """OrtValues over the slots' tensors; what lies where sessions read it is not copied."""
        tensors = {} if self.constant else named_tensors(self.slots, self.plans, slots)
        return Binding(self, self._values(tensors))

    @property
    def written(self) -> Binding[Values]:
        """The buffers that weights are written to."""
        return Binding(self, self._written)

    def listing(self) -> dict[str, Dump]:
        """The models that the sessions were made of."""
        from lorac.backends.onnx.listing import listing  # what a call does not need

        return {name: listing(self.files, name, part.slots) for name, part in self.parts.items()}

    def activate(self, content: Values) -> None:
        """Nothing: every call names its binding."""

    def hold(self, snapshot: Snapshot) -> None:
        """Remember it: constants that were made of it serve again."""
        self._holds = snapshot
        self.where.written(self.memory)

    def settle(self) -> None:
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
            self._settled[snapshot] = _Settled(sessions, self._values({}))

    @property
    def constant(self) -> bool:
        """A baked program's adapters are constants."""
        return self.mode == "baked"

    @property
    def portable(self) -> bool:
        """Whether there are slots to fill."""
        return bool(self.slots) and not self.constant

    def write_choice(self, snapshot: Snapshot, graph: str, path: Path) -> None:
        """An ``.onnx_adapter``."""
        slots = self.parts[require_component(graph, self.parts)].slots
        if self.fused:
            tensors = written_tensors(fed(slots, self.plans), self.base, snapshot)
        else:
            tensors = bound_tensors(slots, self.plans, self.base, snapshot)
        write_choice(path, tensors)

    def _with_constants(self, name: str, part: GraphSession) -> ort.InferenceSession:
        constants = {slot: self.memory[slot] for slot in part.slots if slot in self.memory}
        if not constants:
            return part.session
        return settled_session(self.files, name, constants, self.options)

    @property
    def folder(self) -> Path:
        """Where the program lay when it was opened; nothing is read from there any more."""
        name, held = next(iter(self.files.items()))
        return held.where.parents[name.count("/")]

    @property
    def settled(self) -> bool:
        """Whether calls run on constants now."""
        return self._holds in self._settled

    # --- calls -------------------------------------------------------------------------------------------------

    def call(self, content: Values, graph: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Answer:
        """One call of a graph with a binding."""
        part = self.parts[require_component(graph, self.parts)]
        if part.cache is not None:
            return self._call_over_texts(content, graph, part, args, kwargs)
        session, values = self._serving(part, graph, content)

        def run(given: dict[str, Any]) -> list[Any]:
            as_numpy = all(isinstance(v, np.ndarray) for v in given.values())
            return [_answer(value, as_numpy) for value in self._execute(part, graph, session, values, given)]

        output, extra = part.signature.run(args, kwargs, run)
        return Answer(output, grouped_aux(extra, values.tensors))

    def keeps(self, graph: str) -> Keeps | None:
        """As its session says."""
        layout = self.parts[require_component(graph, self.parts)].cache
        return None if layout is None else layout.keeps

    def new_cache(self, graph: str, rows: int, capacity: int) -> Cache:
        """Buffers that the session reads and writes."""
        layout = self.parts[require_component(graph, self.parts)].cache
        return super().new_cache(graph, rows, capacity) if layout is None else OrtCache(layout, rows, capacity)

    def extend(  # type: ignore[override]  # the content is what it made itself
        self, content: Values, graph: str, cache: Cache, extension: Extension
    ) -> Tensor:
        """One run of the graph's session."""
        assert isinstance(cache, OrtCache)
        part = self.parts[graph]
        session, values = self._serving(part, graph, content)
        return extend(session, values, cache, extension, lambda: _bound(part, session, values))

    def encode(  # type: ignore[override]  # as above
        self, content: Values, graph: str, cache: Cache, inputs: Mapping[str, object]
    ) -> None:
        """One run of the session of the graph's encoder."""
        self._encoded(content, graph, cache, inputs)

    def _encoded(
        self, content: Values, graph: str, cache: Cache, inputs: Mapping[str, object]
    ) -> dict[str, torch.Tensor]:
        """As ``encode``; returns what of the encoder's answer the host answers too, by name."""
        assert isinstance(cache, OrtCache)
        name = encoder_of(graph)
        part = self.parts[name]
        given = part.signature.bind((), inputs)
        session, values = self._serving(part, name, content)
        found = [taken(value) for value in self._execute(part, name, session, values, given)]
        answered = dict(zip(part.outputs, found, strict=True))
        memory = {made: value for made, value in answered.items() if is_memory(made)}
        refuse_other_rows(memory, len(cache.lengths))
        cache.remember(memory)
        return {made: value for made, value in answered.items() if made not in memory}

    def _call_over_texts(
        self, content: Values, graph: str, part: GraphSession, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> Answer:
        """A plain call of a graph that keeps a cache: whole texts, of which nothing is kept."""
        assert part.cache is not None
        text, inputs = part.cache.text, dict[str, Any]()
        if part.cache.keeps.encodes:
            named = part.signature.named(args, kwargs)
            inputs = {name: named.pop(name) for name in part.cache.keeps.encodes if name in named}
            args, kwargs = (), named
        told, counts = whole_texts(args, kwargs, text)
        ids = part.wanted[text].fit(told[text])
        part.cache.refuse_longer(max(counts, default=0))
        extension = all_tokens(ids, counts)
        picked = {PLACES: extension.wanted} if PLACES in part.wanted else {}
        part.signature.bind((), {**told, **picked})
        cache = self.new_cache(graph, *ids.shape)
        encoded = self._encoded(content, graph, cache, inputs) if part.cache.keeps.encodes else {}
        logits = self.extend(content, graph, cache, extension)
        logits[torch.arange(ids.shape[1]) >= torch.tensor(counts)[:, None]] = 0
        as_numpy = isinstance(told[text], np.ndarray)
        answered: list[Any] = [logits.numpy() if as_numpy else logits]
        elsewhere = {name: value.numpy() if as_numpy else value for name, value in encoded.items()}
        rest = (None for _ in part.signature.extra)
        output, _ = part.signature.having(elsewhere).answer([*answered, *rest], kwargs)
        return Answer(output)

    def outputs(self, graph: str, tensors: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """A graph's outputs as it gives them, copied, for tensors in its slots and inputs by name."""
        part = self.parts[graph]
        if part.cache is not None and PAST not in inputs:
            inputs = {**empty_cache(part.cache.shapes, inputs[part.cache.text], part.cache.memory), **inputs}
        values = self._execute(part, graph, part.session, self._values(tensors), inputs)
        return [taken(value).clone() for value in values]

    def _values(self, tensors: Mapping[str, Tensor]) -> Values:
        """What is bound for slot name -> tensor."""
        return Values({name: self.where.held(tensor) for name, tensor in tensors.items()}, tensors)

    def _execute(
        self,
        part: GraphSession,
        graph: str,
        session: ort.InferenceSession,
        values: Values,
        given: Mapping[str, Any],
    ) -> Sequence[ort.OrtValue]:
        io = _io(part, graph, session, values)
        held = {name: part.wanted[name].fit(value) for name, value in given.items()}
        for name, tensor in held.items():
            io.bind_ortvalue_input(name, aliased(tensor))
        io.clear_binding_outputs()
        answered = self.where.answers(held.values())
        for name in part.outputs:
            io.bind_output(name, *answered)
        self.where.settled()
        session.run_with_iobinding(io)
        outputs: Sequence[ort.OrtValue] = io.get_outputs()
        io.clear_binding_outputs()
        return outputs

    def _serving(self, part: GraphSession, graph: str, values: Values) -> tuple[ort.InferenceSession, Values]:
        settled = self._settled.get(self._holds) if values is self._written else None
        return (part.session, values) if settled is None else (settled.sessions[graph], settled.values)


@dataclass(frozen=True, eq=False)
class _Settled:
    """Sessions with constants by graph, and the values that are left to bind: none."""

    sessions: Mapping[str, ort.InferenceSession]
    values: Values


def _telling(part: GraphSession) -> CallSignature:
    """How a graph is called, with what its session has the CPU compute; another machine's may have it otherwise."""
    there = on_cpu(part.session)
    if not there:
        return part.signature
    told = ", ".join(f"{op} ({count})" if count > 1 else op for op, count in there.items())
    note = f"the CPU computes, inside each call on {part.session.get_providers()[0]}: {told}"
    return dataclasses.replace(part.signature, notes=(*part.signature.notes, note))


def _io(part: GraphSession, graph: str, session: ort.InferenceSession, values: Values) -> Any:
    """This thread's IOBinding of a graph with its slots bound."""
    owned: dict[str, Any] = vars(values.own).setdefault("io", {})
    if graph in owned and owned[graph][0]() is session:
        return owned[graph][1]
    io = _bound(part, session, values)
    owned[graph] = (weakref.ref(session), io)
    return io


def _bound(part: GraphSession, session: ort.InferenceSession, values: Values) -> Any:
    """A new IOBinding of a graph with its slots bound."""
    io = session.io_binding()
    for name in part.slots.keys() & values.values.keys():
        io.bind_ortvalue_input(name, values.values[name])
    return io


def _answer(value: ort.OrtValue, as_numpy: bool) -> Any:
    tensor = taken(value)
    if not as_numpy:
        return tensor
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()  # NumPy has nothing for it
