"""Captured graphs of the zoo's models with adapters, at any stage of the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import lorac
from lorac import Site
from lorac.frontend.capture.export import capture_graph
from lorac.frontend.host import Host
from lorac.ir.calls.interface import Interface
from lorac.ir.calls.output_structure import OutputStructure
from lorac.ir.graph.feeds import collect_slot_tensors
from lorac.ir.graph.graph import Graph
from lorac.ir.graph.interpreter import run_graph
from lorac.ir.graph.passes import run_pipeline
from lorac.ir.slots.composition import compose_choice, fill_slots
from lorac.ir.slots.plans import SitePlan
from lorac.passes.pipelines import lowering_passes
from tests.zoo import ZOO


class Block(nn.Module):
    """A residual block; `first` makes it compute a scale that the others read."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(10, 14), nn.Linear(10, 14)
        self.out = nn.Linear(14, 10)
        self.first = first

    def forward(self, x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        mixed = torch.tanh(self.query(x)) * self.key(x)
        if self.first:
            scale = torch.sigmoid(x.mean(-1, keepdim=True))
        return x + self.out(mixed if scale is None else mixed * scale), scale


class Stack(nn.Module):
    """Three blocks, alike or with a first one that computes more: what many transformers are, and quick to capture."""

    def __init__(self, first_differs: bool = False) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"layers": nn.ModuleList(Block(first_differs and i == 0) for i in range(3))})

    def forward(self, x: Tensor) -> Tensor:
        scale = None
        for layer in cast(nn.ModuleList, self.body["layers"]):
            x, scale = layer(x, scale)
        return x


def graph_of(name: str, exported: ExportedProgram, sites: Mapping[str, Site], plans: Mapping[str, SitePlan]) -> Graph:
    """A graph at level host over a program that takes any sizes."""
    signature = exported.module_call_graph[0].signature
    assert signature is not None
    inputs, structure = tuple(map(str, exported.graph_signature.user_inputs)), OutputStructure(signature.out_spec)
    outputs = structure.tensor_names(inputs)
    return Graph(name, exported, sites, plans, Interface(inputs=inputs, outputs=outputs, structure=structure))


@torch.no_grad()
def interpret(graph: Graph, inputs: Mapping[str, Any], slots: Mapping[str, Tensor] | None = None) -> Any:
    """The model's output object, as the reference interpreter computes it."""
    return graph.interface.build_output(
        run_graph(graph, graph.interface.check(graph.interface.bind((), inputs)), slots)
    )[0]


def captured_program(model: nn.Module, inputs: object = None, shapes: object = None) -> ExportedProgram:
    """A model as captured, before it is a graph."""
    return capture_graph("main", Host.of(model), inputs, shapes, sites={}, plans={}).exported


def captured_stack(adapters: dict[str, Any] | None = None, *, first_differs: bool = False) -> Graph:
    """The stack's graph at level host."""
    model, inputs = Stack(first_differs), (torch.randn(2, 5, 10),)
    compiled = lorac.compile(model, adapters=adapters or {})
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},)
    return graph_of("stack", captured_program(model, inputs, shapes), compiled.sites, compiled.plans)


@dataclass
class Captured:
    """A compiled model in eager, and a fresh capture of its host."""

    compiled: Any
    graph: Graph
    inputs: dict[str, Tensor]

    def slots(self) -> dict[str, Tensor]:
        """What the active choice puts into the graph's slots."""
        return filled(self.compiled, self.graph)


def filled(compiled: Any, graph: Graph) -> dict[str, Tensor]:
    """What a compiled model's active choice puts into the slots of a graph with its plans."""
    snapshot = compose_choice(compiled.plans, compiled.pool, compiled.choice, compiled.session.base)
    slots = fill_slots(compiled.plans, snapshot, compiled.session.base)
    return collect_slot_tensors(graph.slots, compiled.plans, slots)


def two_adapters(name: str) -> dict[str, Any]:
    """A DoRA on some sites and a LoRA on others, with sites in common."""
    targets = ZOO[name].targets
    return {
        "style": lorac.DoRA(r=3, alpha=6, targets=list(targets[:2])),
        "task": lorac.LoRA(r=2, alpha=4, targets=[targets[0], targets[-1]]),
    }


def capture(name: str, adapters: dict[str, Any] | None = None, *, mode: str = "auto", **options: Any) -> Captured:
    """The model in float64 with adapters away from their init, the mixture of all active."""
    entry = ZOO[name]
    inputs = entry.inputs(dtype=torch.float64)
    given = two_adapters(name) if adapters is None else adapters
    compiled = lorac.compile(entry.fresh(torch.float64), adapters=given, mode=mode, example_inputs=inputs, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in compiled.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(noise.to(parameter.dtype), alpha=0.1)
    compiled.swap({adapter: 1.0 - 0.3 * i for i, adapter in enumerate(given)})
    exported = captured_program(entry.fresh(torch.float64), inputs)
    return Captured(compiled, graph_of("main", exported, compiled.sites, compiled.plans), inputs)


def lower(graph: Graph, observe: Callable[[str, Graph], None] | None = None) -> list[str]:
    """Run the passes; returns those that changed the graph."""
    return [name for name, outcome in run_pipeline(graph, lowering_passes(), observe) if outcome.changed]
