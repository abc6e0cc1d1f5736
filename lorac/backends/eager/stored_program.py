"""A stored program that runs in PyTorch, which ``lorac.load`` returns for an eager artifact; it cannot train."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorac.ir.calls.call import Call
from lorac.ir.calls.interface import Interface
from lorac.ir.graph.feeds import group_aux_outputs
from lorac.ir.graph.graph import SlotInput
from lorac.storage.program import StoredProgram
from lorac.target.engine import CallResult
from lorac.target.placed_engine import LoadedProgram, PlacedEngine, PlacedProgram, translate_program_errors


@dataclass(frozen=True, eq=False)
class StoredGraph:
    """One graph of the program, with its interface, and its slot inputs by public name."""

    program: StoredProgram
    interface: Interface
    slots: Mapping[str, SlotInput]


class StoredProgramEngine(PlacedEngine[StoredGraph]):
    """An engine for a stored program whose slots are inputs.

    Args:
        device: the device of the program, to which slots' tensors are moved; the adapters are not moved.
    """

    target = "eager"

    def __init__(self, program: LoadedProgram[StoredGraph, Any], device: torch.device | None = None) -> None:
        super().__init__(program)
        self.device = device

    def bind_tensors(self, tensors: Mapping[str, Tensor]) -> "StoredBoundProgram":
        return StoredBoundProgram(self, {name: tensor.detach().to(self.device) for name, tensor in tensors.items()})

    @property
    def written_program(self) -> "StoredBoundProgram":
        return StoredBoundProgram(self, self.memory)


@dataclass(frozen=True, eq=False)
class StoredBoundProgram(PlacedProgram):
    """A stored program with the tensors of a choice of adapters."""

    engine: StoredProgramEngine

    @torch.no_grad()
    def run(self, graph: str, call: Call) -> CallResult:
        part = self.engine.graphs[graph]

        def run(arguments: dict[str, object]) -> list[object]:
            inputs = {name: torch.as_tensor(value) for name, value in arguments.items()}
            with translate_program_errors():
                filled = {slot.node: self.tensors[name] for name, slot in part.slots.items()}
                values: list[object] = [*part.program.call_bounded({**inputs, **filled})]
            if arguments and all(isinstance(value, np.ndarray) for value in arguments.values()):
                values = [value.numpy(force=True) if isinstance(value, Tensor) else value for value in values]
            return values

        output, extra = part.interface.run(call, run)
        return CallResult(output, group_aux_outputs(extra, self.tensors))
