"""The reference interpreter, which runs a graph of any level op by op.

Tests compare it with the model, and backends with it. At level host every ``lorac`` op computes its layer; at level
adapted an ``adapted`` op is ``run_site`` over its slots; below there is only aten. Where an op allows several results,
the interpreter chooses: top-k and sort break ties by the lowest index, as every lowering must.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from lorac.ir.calls.sizes import AxisSizes
from lorac.ir.graph import ops
from lorac.ir.graph.adapted_call import AdaptedCall, compute_adapted
from lorac.ir.graph.attention_ops import find_token_input, is_encoder_output
from lorac.ir.graph.feeds import cache_input_shapes, make_empty_cache
from lorac.ir.graph.graph import Graph, find_origins
from lorac.ir.graph.nodes import SLOTS_KEYWORD

aten = torch.ops.aten
TOLERANCE = 1e-3
"""Largest ``relative_error`` between two computations of one value. Rounding in float32 causes 1e-6 to 1e-5; a wrong
result has a far larger error."""
_ROUNDINGS = 8
"""The tolerance as a number of roundings, for precisions in which one rounding exceeds ``TOLERANCE``."""


@torch.no_grad()
def run_graph(
    graph: Graph,
    inputs: Mapping[str, Tensor],
    slots: Mapping[str, Tensor] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> list[Any]:
    """Run a graph; return its outputs in order.

    Args:
        graph: at any level.
        inputs: by the program's names (``Interface.check``).
        slots: slot input -> tensor (``lorac.ir.graph.feeds.collect_slot_tensors``); needed from level adapted on.
        weights: parameters and buffers by name; by default the graph's own.

    Raises:
        KeyError: an input or a slot input has no tensor.
    """
    tensors = graph.exported.state_dict if weights is None else weights
    slot_nodes = {slot.node: slots[name] for name, slot in graph.slots.items()} if slots else {}
    caches: dict[str, object] = {}
    if graph.cache_inputs:
        ids = inputs[find_token_input(inputs)]
        empty = make_empty_cache(cache_input_shapes(graph), ids, cache_input_shapes(graph, is_encoder_output))
        caches = {node: inputs.get(name, empty.get(name)) for name, node in graph.cache_inputs.items()}
    given: dict[str, Any] = {**caches, **inputs, **slot_nodes}
    signature, flat, stored = graph.exported.graph_signature, list[Any](), {**graph.exported.constants, **tensors}
    # A model that writes into its buffers must write into copies, not into the model's tensors.
    writes = bool(graph.find_writes())
    for spec in signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            flat.append(given[getattr(spec.arg, "name", "")])
        elif spec.kind is InputKind.PARAMETER:
            flat.append(tensors[str(spec.target)])
        else:
            value = stored[str(spec.target)]
            flat.append(value.clone() if writes and isinstance(value, Tensor) else value)
    values = zip(_Interpreter(graph).run(*flat), signature.output_specs, strict=True)
    return [value for value, spec in values if spec.kind is OutputKind.USER_OUTPUT]


def evaluate(node: fx.Node, known: Mapping[fx.Node, torch.Tensor], sizes: Mapping[str, int]) -> torch.Tensor:
    """Compute a node's value from the values of other nodes.

    Args:
        node: the node.
        known: values of other nodes.
        sizes: torch's symbol for a size -> the size.
    """
    values, needed = dict[fx.Node, Any](known), find_origins(node)
    with torch.no_grad():
        for each in node.graph.nodes:  # in order, since an op may write into a value
            if each not in needed or each in values or each.op != "call_function":
                continue
            example = each.meta.get("val")
            if isinstance(example, torch.SymInt | int) and str(example) in sizes:
                values[each] = sizes[str(example)]
            elif values.keys() >= set(each.all_input_nodes):
                args, kwargs = fx.map_arg((each.args, each.kwargs), values.__getitem__)
                values[each] = each.target(*args, **kwargs)
    value: torch.Tensor = values[node]
    return value


def read_example_inputs(graph: Graph, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the inputs of the captured call, by name."""
    args, kwargs = graph.exported.example_inputs or ((), {})
    given = {name: value for name, value in kwargs.items() if name != SLOTS_KEYWORD and name not in graph.slots}
    if set(names) <= given.keys():
        return {name: given[name] for name in names}
    leaves = [leaf for leaf in pytree.tree_leaves((args, given)) if isinstance(leaf, Tensor)]
    return dict(zip(names, leaves, strict=True))


def resize_inputs(inputs: Mapping[str, Tensor], chosen: AxisSizes) -> dict[str, Tensor]:
    """Repeat or cut inputs to other sizes: ids stay ids, masks stay masks, and rising offsets stay sorted."""
    changed = dict(inputs)
    for (name, axis), size in chosen.items():
        value = changed[name]
        places = torch.arange(size, device=value.device) % value.shape[axis]
        changed[name] = value.index_select(axis, places)
        if value.dim() == 1 and not value.is_floating_point() and torch.equal(value, value.sort().values):
            changed[name] = changed[name].sort().values
    return changed


def relative_error(y: Tensor, ref: Tensor) -> float:
    """Return ‖y − ref‖ / ‖ref‖; infinity for different shapes, infinities or NaNs.

    Integers are not compared: rounding may decide between two integers, and both are correct.
    """
    if y.shape != ref.shape:
        return math.inf
    if not ref.is_floating_point() or (y.dtype == ref.dtype and torch.equal(y, ref)):  # NaN != NaN
        return 0.0
    finite = torch.isfinite(ref)
    if not torch.equal(torch.nan_to_num(y[~finite]), torch.nan_to_num(ref[~finite])):
        return math.inf
    computed, expected = y[finite].double(), ref[finite].double()
    error, norm = (float(torch.linalg.vector_norm(value)) for value in (computed - expected, expected))
    return error / norm if error and norm else math.inf if error else 0.0


def differs_beyond_rounding(y: Tensor, ref: Tensor) -> bool:
    """Whether two computations of a value differ by more than rounding; a NaN differs from every value."""
    rounding = torch.finfo(ref.dtype).eps if ref.is_floating_point() else 0.0
    return not relative_error(y, ref) <= max(TOLERANCE, _ROUNDINGS * rounding)


class _Interpreter(fx.Interpreter):
    """An interpreter that also runs adapted ops, and breaks ties by the lowest index."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph.exported.graph_module)
        self._program = graph

    def run_node(self, n: fx.Node) -> object:
        """Run a node without the record that fx keeps for tracebacks, which takes longer than a small op."""
        operands, named = self.fetch_args_kwargs_from_env(n)
        if n.target is ops.adapted:
            call = AdaptedCall(*operands)
            return compute_adapted(self._program.plan_of(call.site), call, self._program.sites)
        if n.op == "call_function":
            target: Any = n.target
            return _FUNCTIONS.get(target, target)(*operands, **named)
        return getattr(self, n.op)(n.target, operands, named)


def _topk(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Tensor, Tensor]:
    values, indices = torch.sort(x, dim=dim, descending=largest, stable=True)
    return values.narrow(dim, 0, k), indices.narrow(dim, 0, k)


TIE_BREAKING_OPS: Mapping[object, Callable[..., object]] = {
    aten.topk.default: _topk,
    aten.sort.default: lambda x, dim=-1, descending=False: tuple(
        torch.sort(x, dim=dim, descending=descending, stable=True)
    ),
}
"""Op whose order of ties torch leaves open -> function that breaks ties by the lowest index."""
_FUNCTIONS: Mapping[object, Callable[..., object]] = {**TIE_BREAKING_OPS, **ops.OP_FUNCTIONS}
"""Op -> the function that computes it: ops that break ties, and lorac's ops."""
