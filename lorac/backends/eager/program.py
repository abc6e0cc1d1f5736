"""A stored program run in PyTorch: what ``lorac.load`` gives for an eager artefact. It answers, and does not train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lorac.ir.binding import Answer, Binding
from lorac.ir.engine import Engine, Files
from lorac.ir.graph.feeds import fed, grouped_aux, named_tensors
from lorac.ir.graph.graph import SlotInput
from lorac.ir.graph.signature import CallSignature
from lorac.ir.host.components import require_component
from lorac.ir.host.sites import BaseReader
from lorac.ir.slots.buffers import fused_buffers
from lorac.ir.slots.site import SitePlan, SiteSlots
from lorac.ir.slots.snapshot import Snapshot
from lorac.ir.store.program import StoredProgram

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class StoredGraph:
    """One graph of the program: its nodes, how it is called, and its slot inputs by public name."""

    program: StoredProgram
    signature: CallSignature
    slots: Mapping[str, SlotInput]


Tensors = Mapping[str, Tensor]
"""What one choice puts into every slot input, by name."""


class ProgramEngine(Engine):
    """Runs a program whose slots are inputs.

    Args:
        parts: graph name -> its part of the program.
        plans: slots of every site.
        base: reads base weights.
        mode: ``"live"``, ``"fused"`` or ``"baked"``.
        files: the stored program.
        device: where the program runs; the adapters stay where they are, what a choice puts into slots goes there.
    """

    target = "eager"
    files: Files

    def __init__(
        self,
        *,
        parts: Mapping[str, StoredGraph],
        plans: Mapping[str, SitePlan],
        base: BaseReader,
        mode: str,
        files: Files,
        device: torch.device | None = None,
    ) -> None:
        self.parts = parts
        self.slots = {name: slot for part in parts.values() for name, slot in part.slots.items()}
        self.signatures = {name: part.signature for name, part in parts.items()}
        self.plans = fed(self.slots, plans)
        self.base, self.mode, self.files, self.device = base, mode, files, device
        self.buffers, memory = fused_buffers(self.plans, base) if self.fused else ({}, {})
        self._memory = memory

    def bind(self, snapshot: Snapshot, slots: Mapping[str, SiteSlots]) -> Binding[Tensors]:
        """The slots' tensors by input."""
        tensors = named_tensors(self.slots, self.plans, slots)
        return Binding(self, {name: tensor.detach().to(self.device) for name, tensor in tensors.items()})

    @property
    def written(self) -> Binding[Tensors]:
        """The buffers that weights are written to."""
        return Binding(self, self._memory)

    def hold(self, snapshot: Snapshot) -> None:
        """Nothing: the program reads the buffers, whatever they hold."""

    def activate(self, content: Tensors) -> None:
        """Nothing: every call names its binding."""

    @torch.no_grad()
    def call(self, content: Tensors, graph: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Answer:
        """One call of a graph with what fills its slots."""
        part = self.parts[require_component(graph, self.parts)]
        filled = {slot.node: content[name] for name, slot in part.slots.items()}

        def run(given: dict[str, Any]) -> list[Any]:
            inputs = {name: torch.as_tensor(value) for name, value in given.items()}
            values: list[Any] = list(part.program(**inputs, **filled))
            if given and all(isinstance(value, np.ndarray) for value in given.values()):
                values = [value.numpy(force=True) if isinstance(value, Tensor) else value for value in values]
            return values

        output, extra = part.signature.run(args, kwargs, run)
        return Answer(output, grouped_aux(extra, content))
