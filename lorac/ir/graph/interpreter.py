"""The reference interpreter: runs a graph at any level, op by op. It is compared with the host, and backends with it.

At level host every ``lorac`` op computes what the layer computes; at level adapted an ``adapted`` op is ``run_site``
over its slots; below that there is only aten. Where several answers are allowed, one is chosen: top-k and sort give
ties to the lowest index, as every lowering must.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from lorac.ir.graph import ops
from lorac.ir.graph.adapted_call import AdaptedCall, compute_adapted
from lorac.ir.graph.attention_ops import find_token_input
from lorac.ir.graph.edit import SLOTS_KEYWORD
from lorac.ir.graph.feeds import cache_input_shapes, encoder_output_shapes, make_empty_cache
from lorac.ir.graph.graph import Graph
from lorac.ir.sizes import AxisSizes

aten = torch.ops.aten
Tensor = torch.Tensor
TOLERANCE = 1e-3
"""What two computations of one thing may differ by (``distance``). In float32 rounding leaves 1e-6 to 1e-5; what is
computed wrongly is off by far more."""
_ROUNDINGS = 8
"""The same in precisions where one rounding is more than that: so many of them."""


@dataclass(frozen=True)
class InterpreterResult:
    """What a graph computes.

    Attributes:
        output: the host's own output object.
        extra: further outputs by name (``aux``).
    """

    output: Any
    extra: Mapping[str, object] = field(default_factory=dict)


@torch.no_grad()
def interpret(graph: Graph, inputs: Mapping[str, Any], slots: Mapping[str, Tensor] | None = None) -> InterpreterResult:
    """Run a graph.

    Args:
        graph: at any level.
        inputs: what the host is called with, by name.
        slots: slot input -> tensor (``lorac.ir.graph.feeds.collect_slot_tensors``); needed from level adapted on.

    Raises:
        KeyError: a slot input is not filled.
        ChoiceError: an argument the graph was not captured with, or a missing one.
    """
    interface = graph.interface
    output, extra = interface.build_output(run_graph(graph, interface.check((), inputs), slots))
    return InterpreterResult(output, extra)


@torch.no_grad()
def run_graph(
    graph: Graph,
    inputs: Mapping[str, Any],
    slots: Mapping[str, Tensor] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> list[Any]:
    """As ``interpret``, for inputs by the names the program has for them; the outputs as a flat list.

    Args:
        graph, inputs, slots: as ``interpret``'s.
        weights: the parameters and buffers to compute with, by name; default: the graph's own.
    """
    held = graph.exported.state_dict if weights is None else weights
    given = {**_nothing_before(graph, inputs), **inputs, **_by_node(graph, slots or {})}
    values = _Interpreter(graph).run(*_flat(graph, given, held))
    specs = graph.exported.graph_signature.output_specs
    return [v for v, spec in zip(values, specs, strict=True) if spec.kind is OutputKind.USER_OUTPUT]


def read_example_inputs(graph: Graph, names: Sequence[str]) -> dict[str, Tensor]:
    """The inputs the program was captured with, by name."""
    args, kwargs = graph.exported.example_inputs or ((), {})
    given = {name: value for name, value in kwargs.items() if name != SLOTS_KEYWORD and name not in graph.slots}
    if set(names) <= given.keys():
        return {name: given[name] for name in names}
    leaves = [leaf for leaf in pytree.tree_leaves((args, given)) if isinstance(leaf, Tensor)]
    return dict(zip(names, leaves, strict=True))


def resize_inputs(inputs: Mapping[str, Tensor], chosen: AxisSizes) -> dict[str, Tensor]:
    """Inputs of other sizes, made of these by repeating or cutting them, so that ids stay ids and masks masks."""
    changed = dict(inputs)
    for (name, axis), size in chosen.items():
        value = changed[name]
        places = torch.arange(size, device=value.device) % value.shape[axis]
        changed[name] = value.index_select(axis, places)
    return changed


def relative_error(y: Tensor, ref: Tensor) -> float:
    """‖y − ref‖ / ‖ref‖; infinite where shapes differ, or where one is infinite or no number and the other is not.

    Integers are not compared: where rounding decides between two, either is right.
    """
    if y.shape != ref.shape:
        return math.inf
    if not ref.is_floating_point() or (y.dtype == ref.dtype and torch.equal(y, ref)):  # no NaN equals another
        return 0.0
    finite = torch.isfinite(ref)
    if not torch.equal(torch.nan_to_num(y[~finite]), torch.nan_to_num(ref[~finite])):
        return math.inf
    found, wanted = y[finite].double(), ref[finite].double()
    error, norm = (float(torch.linalg.vector_norm(value)) for value in (found - wanted, wanted))
    return error / norm if error and norm else math.inf if error else 0.0


def differs_beyond_rounding(y: Tensor, ref: Tensor) -> bool:
    """Whether two computations of one thing differ by more than rounding. Written so that a NaN differs too."""
    rounding = torch.finfo(ref.dtype).eps if ref.is_floating_point() else 0.0
    return not relative_error(y, ref) <= max(TOLERANCE, _ROUNDINGS * rounding)


class _Interpreter(fx.Interpreter):
    """fx's interpreter, with the meaning of adapted ops and one answer for ties."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph.exported.graph_module)
        self._program = graph

    def run_node(self, n: fx.Node) -> Any:
        """As fx's own, without noting for tracers and tracebacks which node runs: that takes longer than small ops."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return getattr(self, n.op)(n.target, args, kwargs)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is ops.adapted:
            call = AdaptedCall(*args)
            return compute_adapted(self._program.plan_of(call.site), call, self._program.sites, {})
        return _MEANINGS.get(target, target)(*args, **kwargs)


def _topk(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Tensor, Tensor]:
    values, indices = torch.sort(x, dim=dim, descending=largest, stable=True)
    return values.narrow(dim, 0, k), indices.narrow(dim, 0, k)


def _sort(x: Tensor, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    values, indices = torch.sort(x, dim=dim, descending=descending, stable=True)
    return values, indices


_MEANINGS: Mapping[Any, Callable[..., Any]] = {aten.topk.default: _topk, aten.sort.default: _sort, **ops.OP_FUNCTIONS}
"""Ops that torch answers with any of several equal elements, and what they are here; and lorac's own, which are called
as what they are: torch's way to an op that is written in Python takes longer than a small product."""


def _nothing_before(graph: Graph, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Empty caches for a graph that keeps some, where the call has none of its own."""
    if not graph.cache_inputs:
        return {}
    made = make_empty_cache(cache_input_shapes(graph), inputs[find_token_input(inputs)], encoder_output_shapes(graph))
    return {node: inputs.get(name, made.get(name)) for name, node in graph.cache_inputs.items()}


def _by_node(graph: Graph, slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {slot.node: slots[name] for name, slot in graph.slots.items()}


def _flat(graph: Graph, given: Mapping[str, Any], weights: Mapping[str, Tensor]) -> list[Any]:
    """The program's inputs in order: parameters, buffers, constants, the host's own inputs, slots."""
    program, flat = graph.exported, []
    # A model that writes into its buffers is captured with the ops that do: not into the host's, which these are.
    own = torch.clone if any(map(_writes, graph.fx.nodes)) else lambda held: held
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            flat.append(given[getattr(spec.arg, "name", "")])
        elif spec.kind is InputKind.PARAMETER:
            flat.append(weights[str(spec.target)])
        else:
            held = {**program.constants, **weights}[str(spec.target)]
            flat.append(own(held) if isinstance(held, Tensor) else held)
    return flat


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
