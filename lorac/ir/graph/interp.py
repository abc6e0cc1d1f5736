"""The reference interpreter: runs a graph at any level, op by op. Backends are compared with it.

At level host every ``lorac`` op computes what the layer computes; at level adapted an ``adapted`` op is ``run_site``
over its slots; below that there is only aten. Where several answers are allowed, one is chosen: top-k and sort give
ties to the lowest index, as every lowering must.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind, OutputKind

from lorac.ir.graph import ops
from lorac.ir.graph.adapted import AdaptedCall, adapted_output
from lorac.ir.graph.graph import Graph
from lorac.ir.graph.signature import CallSignature

aten = torch.ops.aten
Tensor = torch.Tensor


@dataclass(frozen=True)
class Interpreted:
    """What a graph computes.

    Attributes:
        output: the host's own output object.
        extra: further outputs by name (``aux``).
    """

    output: Any
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def interpret(graph: Graph, inputs: Mapping[str, Any], slots: Mapping[str, Tensor] | None = None) -> Interpreted:
    """Run a graph.

    Args:
        graph: at any level.
        inputs: what the host is called with, by name.
        slots: slot input -> tensor (``lorac.ir.graph.feeds.named_tensors``); needed from level adapted on.

    Raises:
        KeyError: a slot input is not filled.
        ChoiceError: an argument the graph was not captured with, or a missing one.
    """
    signature = CallSignature.of(graph)
    output, extra = signature.answer(outputs_of(graph, signature.bind((), inputs), slots))
    return Interpreted(output, extra)


@torch.no_grad()
def outputs_of(graph: Graph, inputs: Mapping[str, Any], slots: Mapping[str, Tensor] | None = None) -> list[Any]:
    """As ``interpret``, for inputs by the names the program has for them; the outputs as a flat list."""
    values = _Interpreter(graph).run(*_flat(graph, {**inputs, **_by_node(graph, slots or {})}))
    specs = graph.exported.graph_signature.output_specs
    return [v for v, spec in zip(values, specs, strict=True) if spec.kind is OutputKind.USER_OUTPUT]


class _Interpreter(fx.Interpreter):
    """fx's interpreter, with the meaning of adapted ops and one answer for ties."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph.exported.graph_module)
        self._program = graph

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is ops.adapted:
            call = AdaptedCall(*args)
            return adapted_output(self._program.plans[call.site], call, self._program.sites, {})
        return _LOWEST_INDEX.get(target, target)(*args, **kwargs)


def _topk(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Tensor, Tensor]:
    values, indices = torch.sort(x, dim=dim, descending=largest, stable=True)
    return values.narrow(dim, 0, k), indices.narrow(dim, 0, k)


def _sort(x: Tensor, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    values, indices = torch.sort(x, dim=dim, descending=descending, stable=True)
    return values, indices


_LOWEST_INDEX: dict[Any, Callable[..., Any]] = {aten.topk.default: _topk, aten.sort.default: _sort}
"""Ops that torch answers with any of several equal elements, and what they are here."""


def _by_node(graph: Graph, slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {slot.node: slots[name] for name, slot in graph.slots.items()}


def _flat(graph: Graph, given: Mapping[str, Any]) -> list[Any]:
    """The program's inputs in order: parameters, buffers, constants, the host's own inputs, slots."""
    program, flat = graph.exported, []
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            flat.append(given[getattr(spec.arg, "name", "")])
        elif spec.target in program.state_dict:
            flat.append(program.state_dict[str(spec.target)])
        else:
            flat.append(program.constants[str(spec.target)])
    return flat
