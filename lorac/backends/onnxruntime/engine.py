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

from lorac.backends.onnxruntime.signature import CallSignature
from lorac.ir.fused import FusedBuffer
from lorac.ir.graph import SlotInput
from lorac.ir.slots import Prepared, SitePlan, SiteSlots
from lorac.ir.snapshot import BaseReader, Snapshot

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
        folder: where the emitted program lies; removed with the engine.
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
    ) -> None:
        self.session, self.signature, self.slots, self.plans = session, signature, slots, plans
        self.base, self.mode, self.folder = base, mode, folder
        self.fused = mode == "fused"
        self.aux: dict[str, dict[str, Any]] = {}
        self._outputs = [output.name for output in session.get_outputs()]
        self.buffers, memory = fused_buffers(plans, base) if self.fused else ({}, {})
        self._fixed = self.bind_tensors(memory) if self.fused else None

    # --- the engine protocol -----------------------------------------------------------------------------------

    def bind(self, snapshot: Snapshot, slots: Mapping[str, SiteSlots]) -> Binding:
        """OrtValues over the slots' tensors; nothing is copied."""
        if self.mode == "baked":
            return self.bind_tensors({})
        return self.bind_tensors(named_tensors(self.slots, self.plans, slots))

    def bind_tensors(self, tensors: Mapping[str, Tensor]) -> Binding:
        """A binding from slot name -> tensor."""
        held = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        return Binding({name: aliased(tensor) for name, tensor in held.items()}, held, threading.local())

    def activate(self, binding: Binding) -> None:
        """Nothing: every call names its binding."""

    def run(self, binding: Binding | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call. Inputs and outputs are torch or numpy, as they came."""
        binding = binding if binding is not None else self._fixed
        assert binding is not None
        given = self.signature.bind(args, kwargs)
        io = self._io(binding)
        held = []
        for name, value in given.items():
            tensor = torch.as_tensor(value).detach().contiguous()
            held.append(tensor)
            io.bind_ortvalue_input(name, aliased(tensor))
        io.clear_binding_outputs()
        for name in self._outputs:
            io.bind_output(name)
        self.session.run_with_iobinding(io)
        as_numpy = all(isinstance(v, np.ndarray) for v in given.values())
        values = [_answer(value, as_numpy) for value in io.get_outputs()]
        io.clear_binding_outputs()
        output, extra = self.signature.answer(values)
        self.aux = _grouped(extra)
        return output

    def write(self, snapshot: Snapshot) -> int:
        """Write merged weights into the buffers the session reads."""
        written = 0
        for path, buffer in self.buffers.items():
            composed = snapshot.composed.get(path)
            written += buffer.write(composed.value if composed is not None else None)
        return written

    def forget(self, prepared: Prepared) -> None:
        """Drop what fused buffers keep for the values of a removed adapter."""
        for path, value in prepared.values.items():
            if path in self.buffers:
                self.buffers[path].release(value)

    def _io(self, binding: Binding) -> Any:
        """This thread's IOBinding with the slots bound."""
        owned = getattr(binding.bindings, "io", None)
        if owned is None or owned[0]() is not self.session:
            io = self.session.io_binding()
            for name, value in binding.values.items():
                io.bind_ortvalue_input(name, value)
            binding.bindings.io = owned = (weakref.ref(self.session), io)
        return owned[1]


def aliased(tensor: Tensor) -> ort.OrtValue:
    """An OrtValue over a contiguous CPU tensor's own memory."""
    value = ort.OrtValue.ortvalue_from_numpy(tensor.numpy())
    assert not tensor.numel() or value.data_ptr() == tensor.data_ptr()
    return value


def named_tensors(
    inputs: Mapping[str, SlotInput], plans: Mapping[str, SitePlan], slots: Mapping[str, SiteSlots]
) -> dict[str, Tensor]:
    """Slot input -> tensor. Idle branches get zeros of their shape."""
    tensors: dict[str, Tensor] = {}
    by_site: dict[str, dict[str, Tensor]] = {}
    for name, slot in inputs.items():
        if slot.site not in by_site:
            by_site[slot.site] = slots[slot.site].named()
        filled = by_site[slot.site].get(slot.role)
        tensors[name] = filled if filled is not None else idle(plans[slot.site], slot.role)
    return tensors


def idle(plan: SitePlan, role: str) -> Tensor:
    """What an idle branch slot holds: strength and parameters of zero."""
    index, _, part = role.removeprefix("branch").partition(".")
    shape = (1,) if part == "t" else list(plan.branches[int(index)].params.values())[int(part)]
    return torch.zeros(shape)


def fused_buffers(
    plans: Mapping[str, SitePlan], base: BaseReader
) -> tuple[dict[str, FusedBuffer], dict[str, Tensor]]:
    """A buffer per bound weight, in slot layout and holding the base, and the memory by slot name."""
    from lorac.ir.kinds import kind_of

    buffers, memory = {}, {}
    for path, plan in plans.items():
        if not plan.bound:
            continue
        site = plan.site
        weight = kind_of(site).layout_weight(base.weight(site)).clone(memory_format=torch.contiguous_format)
        memory[f"{path}:weight"] = weight
        bias = None
        if plan.bound_bias:
            original = base.bias(site)
            bias = torch.zeros(site.out_features) if original is None else original.clone()
            memory[f"{path}:bias"] = bias
        matrix_of = _matrix_view(plan)
        buffers[path] = FusedBuffer(site, weight, matrix_of, lambda site=site: base.weight(site), bias, base.bias(site))  # type: ignore[misc]
    return buffers, memory


def _matrix_view(plan: SitePlan) -> Any:
    from lorac.ir.types import SiteKind

    site = plan.site
    if site.kind in {SiteKind.LINEAR, SiteKind.EMBEDDING}:
        return lambda buffer: buffer.t()
    return site.present


def _answer(value: ort.OrtValue, as_numpy: bool) -> Any:
    array = value.numpy()
    return array if as_numpy else torch.from_numpy(array)


def _grouped(extra: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    grouped: dict[str, dict[str, Any]] = {}
    for key, value in extra.items():
        name, _, path = key.partition(":")
        grouped.setdefault(name, {})[path] = value
    return grouped
