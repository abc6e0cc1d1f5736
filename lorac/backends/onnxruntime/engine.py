"""The ONNX Runtime engine: one session; a binding is a set of values for its slot inputs."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from lorac.backends.onnxruntime.inputs import wanted
from lorac.backends.onnxruntime.session import session_options
from lorac.backends.onnxruntime.settle import settled_session
from lorac.errors import Unavailable
from lorac.ir.graph.feeds import fed, grouped_aux, named_tensors
from lorac.ir.graph.graph import SlotInput
from lorac.ir.graph.signature import CallSignature
from lorac.ir.host.sites import BaseReader
from lorac.ir.slots.buffers import fused_buffers
from lorac.ir.slots.site import SitePlan, SiteSlots
from lorac.ir.slots.snapshot import Snapshot

Tensor = torch.Tensor


@dataclass(eq=False)
class Binding:
    """Values for every slot input.

    Attributes:
        values: slot input -> OrtValue over the tensor's own memory.
        tensors: the tensors, kept alive as long as the binding.
        bindings: thread -> an IOBinding with the slots bound; made on a thread's first call, never shared.
    """

    values: Mapping[str, ort.OrtValue]
    tensors: Mapping[str, Tensor]
    bindings: threading.local


class OrtEngine:
    """Runs one session.

    Args:
        session: the session.
        signature: how the host is called.
        slots: slot inputs by public name.
        plans: slots of every site.
        base: reads base weights without the host.
        mode: ``"live"``, ``"fused"`` or ``"baked"``.
        folder: where the emitted program lies; removed with the engine that made it.
        options: the target's options.
    """

    target = "onnxruntime"

    def __init__(
        self,
        *,
        session: ort.InferenceSession,
        signature: CallSignature,
        slots: Mapping[str, SlotInput],
        plans: Mapping[str, SitePlan],
        base: BaseReader,
        mode: str,
        folder: Path,
        options: Any,
    ) -> None:
        self.session, self.signature, self.slots, self.plans = session, signature, slots, fed(slots, plans)
        self.base, self.mode, self.folder, self.options = base, mode, folder, options
        self.fused = mode == "fused"
        self.settles_alone = self.fused and options.settle == "background"
        self.aux: dict[str, dict[str, Any]] = {}
        self._outputs = [output.name for output in session.get_outputs()]
        self._wanted = wanted(session)
        self.buffers, self.memory = fused_buffers(self.plans, base) if self.fused else ({}, {})
        self._contiguous = WeakTensorKeyDictionary()
        self._fixed = self.bind_tensors(self.memory) if self.fused else None
        self._holds = Snapshot(())
        # By snapshot, weakly: constants that can never serve again are let go.
        self._settled: weakref.WeakKeyDictionary[Snapshot, _Settled] = weakref.WeakKeyDictionary()

    # --- the engine protocol -----------------------------------------------------------------------------------

    def bind(self, snapshot: Snapshot, slots: Mapping[str, SiteSlots]) -> Binding:
        """OrtValues over the slots' tensors; nothing is copied."""
        if self.mode == "baked":
            return self.bind_tensors({})
        return self.bind_tensors(named_tensors(self.slots, self.plans, slots))

    def bind_tensors(self, tensors: Mapping[str, Tensor]) -> Binding:
        """A binding from slot name -> tensor."""
        held = {name: self._laid_out(tensor) for name, tensor in tensors.items()}
        return Binding({name: aliased(tensor) for name, tensor in held.items()}, held, threading.local())

    def _laid_out(self, tensor: Tensor) -> Tensor:
        """The tensor as a session reads it; bindings that hold one tensor share one copy."""
        if tensor.is_contiguous():
            return tensor.detach()
        copied = self._contiguous.get(tensor)
        if copied is None:
            copied = self._contiguous[tensor] = tensor.detach().contiguous()
        return copied

    def activate(self, binding: Binding) -> None:
        """Nothing: every call names its binding."""

    def run(self, binding: Binding | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call. Inputs and outputs are torch or numpy, as they came."""
        session, binding = self._serving(binding)
        given = self.signature.bind(args, kwargs)
        as_numpy = all(isinstance(v, np.ndarray) for v in given.values())
        values = [_answer(value, as_numpy) for value in self._execute(session, binding, given)]
        output, extra = self.signature.answer(values)
        self.aux = grouped_aux(extra, binding.tensors)
        return output

    def outputs(self, binding: Binding, given: Mapping[str, Tensor]) -> list[Tensor]:
        """The program's outputs for its inputs by name, as it gives them, copied."""
        return [torch.from_numpy(value.numpy().copy()) for value in self._execute(self.session, binding, given)]

    def _execute(self, session: ort.InferenceSession, binding: Binding, given: Mapping[str, Any]) -> list[ort.OrtValue]:
        io = _io(session, binding)
        held = []
        for name, value in given.items():
            tensor = self._wanted[name].fit(value)
            held.append(tensor)
            io.bind_ortvalue_input(name, aliased(tensor))
        io.clear_binding_outputs()
        for name in self._outputs:
            io.bind_output(name)
        session.run_with_iobinding(io)
        outputs: list[ort.OrtValue] = io.get_outputs()
        io.clear_binding_outputs()
        return outputs

    def write(self, snapshot: Snapshot) -> int:
        """Write merged weights into the buffers the session reads."""
        written = 0
        for path, buffer in self.buffers.items():
            composed = snapshot.composed.get(path)
            written += buffer.write(composed.change if composed is not None else None)
        self._holds = snapshot
        return written

    def settle(self) -> None:
        """Make a session with the present weights as constants; it serves calls while they are the active ones.

        Raises:
            Unavailable: no weight is bound.
        """
        snapshot, fixed = self._holds, self._fixed
        if fixed is None:
            raise Unavailable(
                "only bound weights can settle, and this program binds none",
                next_step="compile with mode='fused'",
            )
        if snapshot in self._settled:
            return
        session = settled_session(
            self.folder, fixed.tensors, session_options(self.options), list(self.options.providers)
        )
        if self._holds is snapshot:
            self._settled[snapshot] = _Settled(session, self.bind_tensors({}))

    @property
    def settled(self) -> bool:
        """Whether calls run on constants now."""
        return self._holds in self._settled

    def _serving(self, binding: Binding | None) -> tuple[ort.InferenceSession, Binding]:
        settled = self._settled.get(self._holds)
        if binding is None and settled is not None:
            return settled.session, settled.binding
        chosen = binding if binding is not None else self._fixed
        assert chosen is not None
        return self.session, chosen


@dataclass(frozen=True, eq=False)
class _Settled:
    """A session with constants, and a binding for it."""

    session: ort.InferenceSession
    binding: Binding


def _io(session: ort.InferenceSession, binding: Binding) -> Any:
    """This thread's IOBinding with the slots bound."""
    owned = getattr(binding.bindings, "io", None)
    if owned is None or owned[0]() is not session:
        io = session.io_binding()
        for name, value in binding.values.items():
            io.bind_ortvalue_input(name, value)
        binding.bindings.io = owned = (weakref.ref(session), io)
    return owned[1]


def aliased(tensor: Tensor) -> ort.OrtValue:
    """An OrtValue over a contiguous CPU tensor's own memory."""
    value = ort.OrtValue.ortvalue_from_numpy(tensor.numpy())
    assert not tensor.numel() or value.data_ptr() == tensor.data_ptr()
    return value


def _answer(value: ort.OrtValue, as_numpy: bool) -> Any:
    array = value.numpy()
    return array if as_numpy else torch.from_numpy(array)
