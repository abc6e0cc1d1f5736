"""The engine of packages: a choice of adapters is a set of tensors that every call passes."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lorac.backends.aoti.package import Package
from lorac.backends.onnx.engine import OnnxEngine, SlotInputProgram
from lorac.frontend.components import check_component
from lorac.ir.calls.interface import Interface
from lorac.ir.graph.feeds import collect_slot_tensors, select_reached_plans
from lorac.ir.graph.graph import SlotInput
from lorac.ir.slots.composition import ComposedWeights, fill_slots
from lorac.report.dump import Dump
from lorac.storage.tensor_file import write_safetensors
from lorac.target.backend import TargetOptions


class PackagedGraph:
    """One graph of the program: its package, its interface, and its slot inputs by public name."""

    def __init__(self, package: Package, interface: Interface, slots: Mapping[str, SlotInput]) -> None:
        self.package, self.interface, self.slots = package, interface, slots
        self.dtypes: Mapping[str, torch.dtype | None] = package.inputs

    def run(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Run the graph on inputs and slot tensors, given by name."""
        return self.package.run([inputs[name] for name in self.package.inputs])


class AotiEngine(OnnxEngine[PackagedGraph, TargetOptions]):
    """An engine of one package per graph."""

    target = "aoti"

    def bind_tensors(self, tensors: Mapping[str, Tensor]) -> SlotInputProgram:
        return SlotInputProgram(self, {name: tensor.detach().contiguous() for name, tensor in tensors.items()})

    def dump(self) -> dict[str, Dump]:
        """Return nothing, since a package is machine code."""
        return {}

    @property
    def choice_suffix(self) -> str | None:
        return ".slots.safetensors" if self.slots and not self.constant else None

    def write_choice(self, snapshot: ComposedWeights, graph: str, path: Path) -> None:
        """Write the tensors of all slots of a graph as safetensors, in the form that its package accepts."""
        slots = self.graphs[check_component(graph, self.graphs)].slots
        plans = select_reached_plans(slots, self.plans)
        tensors = collect_slot_tensors(slots, plans, fill_slots(plans, snapshot, self.base))
        write_safetensors(path, {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, {})
