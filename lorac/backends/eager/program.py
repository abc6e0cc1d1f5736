"""A stored program run in PyTorch: what ``lorac.load`` gives for an eager artefact. It answers, and does not train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorac.errors import Unavailable
from lorac.ir.graph.feeds import fed, grouped_aux, named_tensors
from lorac.ir.graph.graph import SlotInput
from lorac.ir.graph.signature import CallSignature
from lorac.ir.host.sites import BaseReader
from lorac.ir.slots.buffers import fused_buffers
from lorac.ir.slots.site import SitePlan, SiteSlots
from lorac.ir.slots.snapshot import Snapshot
from lorac.ir.store.program import StoredProgram

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class Feed:
    """The tensors of one choice, by slot input."""

    tensors: Mapping[str, Tensor]


class ProgramEngine:
    """Runs a program whose slots are inputs.

    Args:
        program: the program.
        signature: how the host was called.
        slots: slot inputs by public name.
        plans: slots of every site.
        base: reads base weights.
        mode: ``"live"``, ``"fused"`` or ``"baked"``.
        folder: the artefact.
        device: where the program runs; the adapters stay where they are, what a choice puts into slots goes there.
    """

    target = "eager"
    settled = False
    settles_alone = False

    def __init__(
        self,
        *,
        program: StoredProgram,
        signature: CallSignature,
        slots: Mapping[str, SlotInput],
        plans: Mapping[str, SitePlan],
        base: BaseReader,
        mode: str,
        folder: Path,
        device: torch.device | None = None,
    ) -> None:
        self.program, self.signature, self.slots, self.plans = program, signature, slots, fed(slots, plans)
        self.base, self.mode, self.folder, self.device = base, mode, folder, device
        self.fused = mode == "fused"
        self.aux: dict[str, dict[str, Any]] = {}
        self.buffers, memory = fused_buffers(self.plans, base) if self.fused else ({}, {})
        self._fixed = Feed(memory)

    def bind(self, snapshot: Snapshot, slots: Mapping[str, SiteSlots]) -> Feed:
        """The slots' tensors by input."""
        tensors = named_tensors(self.slots, self.plans, slots)
        return Feed({name: tensor.detach().to(self.device) for name, tensor in tensors.items()})

    def activate(self, binding: Feed) -> None:
        """Nothing: every call names its binding."""

    @torch.no_grad()
    def run(self, binding: Feed | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call. Inputs and outputs are torch or numpy, as they came."""
        feed = binding if binding is not None else self._fixed
        given = self.signature.bind(args, kwargs)
        inputs = {name: torch.as_tensor(value) for name, value in given.items()}
        filled = {self.slots[name].node: tensor for name, tensor in feed.tensors.items()}
        values = list(self.program(**inputs, **filled))
        if given and all(isinstance(value, np.ndarray) for value in given.values()):
            values = [value.numpy(force=True) if isinstance(value, Tensor) else value for value in values]
        output, extra = self.signature.answer(values)
        self.aux = grouped_aux(extra, feed.tensors)
        return output

    def settle(self) -> None:
        """Refuse: eager weights are always what calls run on.

        Raises:
            Unavailable: always.
        """
        raise Unavailable("there is nothing to settle in eager", next_step="target='onnxruntime', mode='fused' settles")

    def write(self, snapshot: Snapshot) -> int:
        """Write merged weights into the buffers the program reads."""
        written = 0
        for path, buffer in self.buffers.items():
            composed = snapshot.composed.get(path)
            written += buffer.write(composed.change if composed is not None else None)
        return written
