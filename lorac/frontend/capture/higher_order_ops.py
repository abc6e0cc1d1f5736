"""inline: bodies of torch's higher-order ops become nodes of the program, so that passes find the sites in them.

Both branches of a ``torch.cond`` are computed, and ``torch.where`` selects. Contexts that do not change results are
dropped.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import fx
from torch._ops import HigherOrderOperator
from torch.export import ExportedProgram

from lorac.errors import CaptureError
from lorac.ir.graph import ops
from lorac.ir.graph.edit import add_constant, insert_call
from lorac.ir.graph.graph import Graph, Skip
from lorac.ir.graph.nodes import find_source_line
from lorac.ir.graph.passes import PassResult, TracePass

aten = torch.ops.aten
_COND = torch.ops.higher_order.cond


@final
@dataclass(frozen=True)
class InlineHigherOrderOps(TracePass):
    """Replace calls of higher-order ops by the nodes of their bodies."""

    name: ClassVar[str] = "inline"

    def apply(self, graph: Graph) -> PassResult:
        """Replace the calls; skip ops without calls of layers, such as loops.

        Raises:
            CaptureError: a layer is called inside an op that a program cannot contain, such as a loop or autocast.
        """
        program, depth = graph.exported, 0
        for node in graph.fx.nodes:  # torch marks the begin and the end of a vmap by one node each
            name = getattr(node.target, "__name__", "")
            depth += (name == "_vmap_increment_nesting") - (name == "_vmap_decrement_nesting")
            if depth and node.target in ops.SITE_OPS:
                raise _refusal(ops.site_of(node), "vmap", find_source_line(node))
        changed = False
        while (node := _find_inlinable(program)) is not None:
            _inline(program, node)
            changed = True
        others = [node.name for node in graph.fx.nodes if isinstance(node.target, HigherOrderOperator)]
        return PassResult(changed, tuple(Skip(name, "no layer is called in it") for name in others))


def _refusal(called: str, around: str, line: str | None) -> CaptureError:
    where = f", at {line}" if line else ""
    return CaptureError(
        f"forward calls '{called}' inside torch's {around}{where}, which a program cannot hold",
        next_step=f"call it outside of {around}; target='eager' runs the model itself",
    )


def _find_inlinable(program: ExportedProgram) -> fx.Node | None:
    """Return the first call that can be inlined."""
    for node in [node for node in program.graph.nodes if isinstance(node.target, HigherOrderOperator)]:
        name = node.target.name()
        is_autocast = name == "wrap_with_autocast"
        # Contexts that disable gradients or autocast do not change results.
        if node.target is _COND or name == "wrap_with_set_grad_enabled" or (is_autocast and not node.args[2]):
            return node
        bodies = _list_bodies(program.graph_module, node)
        sites = [ops.site_of(inner) for body in bodies for inner in body.graph.nodes if inner.target in ops.SITE_OPS]
        if sites or is_autocast:
            lines = (find_source_line(inner) for body in bodies for inner in body.graph.nodes)
            line = next((line for line in lines if line), None)
            called = sites[0] if sites else bodies[0].graph.output_node().name
            raise _refusal(called, name.removeprefix("wrap_with_"), line)
    return None


def _list_bodies(module: fx.GraphModule, node: fx.Node) -> list[fx.GraphModule]:
    """Return the bodies of a higher-order op, and the bodies of ops in them."""
    read = [getattr(module, str(operand.target)) for operand in node.all_input_nodes if operand.op == "get_attr"]
    bodies = [body for body in read if isinstance(body, fx.GraphModule)]
    calls = [(body, n) for body in bodies for n in body.graph.nodes if isinstance(n.target, HigherOrderOperator)]
    return [*bodies, *(inner for body, call in calls for inner in _list_bodies(body, call))]


def _inline(program: ExportedProgram, node: fx.Node) -> None:
    """Replace a call by the nodes of its bodies."""
    bodies = [operand for operand in node.args if isinstance(operand, fx.Node) and operand.op == "get_attr"]
    operands: Any = node.args[3] if node.target is _COND else node.args[node.args.index(bodies[0]) + 1 :]
    outputs = [_copy_body(program, node, getattr(program.graph_module, str(body.target)), operands) for body in bodies]
    for user in list(node.users):
        place: Any = user.args[1]
        assert user.target is operator.getitem
        values = [output[place] for output in outputs]
        selected = values[0] if len(values) == 1 else _select(program, node, values, user.meta["val"])
        user.replace_all_uses_with(selected)
        program.graph.erase_node(user)
    program.graph.erase_node(node)
    for body in bodies:
        if not body.users:
            program.graph.erase_node(body)


def _select(program: ExportedProgram, node: fx.Node, values: Sequence[Any], example: Any) -> fx.Node:
    """Return a node that selects the value of one of two branches by a condition."""
    condition: Any = node.args[0]
    if not isinstance(condition, fx.Node) or not isinstance(condition.meta["val"], torch.Tensor):
        raise CaptureError(
            "forward branches by torch.cond on a size, and a program cannot do so",
            next_step="branch on it in Python, or on a tensor",
        )
    if condition.meta["val"].dim():
        condition = insert_call(program, node, aten.reshape.default, condition, [])
    selected = insert_call(program, node, aten.where.self, condition, *values)
    selected.meta["val"] = example
    return selected


def _copy_body(program: ExportedProgram, node: fx.Node, body: fx.GraphModule, operands: Sequence[Any]) -> Any:
    """Copy a body's nodes before a node; return its outputs."""
    places = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
    known: dict[fx.Node, Any] = dict(zip(places, operands, strict=True))
    with program.graph.inserting_before(node):
        for inner in (inner for inner in body.graph.nodes if inner.op not in {"placeholder", "output"}):
            held = getattr(body, str(inner.target)) if inner.op == "get_attr" else None
            copied = program.graph.node_copy(inner, lambda n: known[n]) if held is None else _move(program, held)
            known[inner] = copied
    return fx.map_arg(body.graph.output_node().args[0], lambda n: known[n])


def _move(program: ExportedProgram, value: torch.Tensor | fx.GraphModule) -> fx.Node:
    """Return a node for a tensor that a body reads, or for a nested body."""
    if isinstance(value, torch.Tensor):
        return add_constant(program, value)
    name = f"body_{sum(1 for _ in program.graph_module.children())}"
    program.graph_module.add_submodule(name, value)
    return program.graph.get_attr(name)
