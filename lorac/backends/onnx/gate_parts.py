"""Parts of gates: the graphs of an ``If``, and the values in place of what an idle gate does not compute."""

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

READS_SIZES = "Shape"
"""The op whose result does not depend on what is in a slot."""


def unshaped_result(value: ir.Value) -> ir.Value:
    """Return the result of a gate for a value, without sizes, since an idle gate returns other sizes."""
    return ir.val(f"{value.name}_gated", type=value.type, shape=_unknown_shape(value))


def placeholder_nodes(value: ir.Value) -> list[ir.Node]:
    """Return nodes for a placeholder tensor of a value's type and rank; the last returns it."""
    assert value.type is not None
    axes = len(_unknown_shape(value))
    shape = ir.tensor([1] * axes, dtype=ir.DataType.INT64, name=f"{value.name}_ones")
    size = ir.val(f"{value.name}_ones", dtype=ir.DataType.INT64, shape=ir.Shape([axes]))
    constant = ir.Node("", "Constant", [], {"value": ir.AttrTensor("value", shape)}, outputs=[size])
    zero = ir.tensor(np.zeros(1, value.type.dtype.numpy()), name=f"{value.name}_zero")
    result = ir.val(f"{value.name}_idle", type=value.type, shape=_unknown_shape(value))
    return [constant, ir.Node("", "ConstantOfShape", [size], {"value": ir.AttrTensor("value", zero)}, outputs=[result])]


def _unknown_shape(value: ir.Value) -> ir.Shape:
    """Return a shape of a value's rank without sizes."""
    assert value.shape is not None
    return ir.Shape([None] * len(value.shape))


def fill_branches(
    gate: ir.Node, name: str, on: Sequence[ir.Value], nodes: Sequence[ir.Node], idle: Sequence[Sequence[ir.Node]]
) -> None:
    """Give a gate its two graphs: ``nodes`` compute the values ``on``, and ``idle`` the values in their place."""
    off = [several[-1].outputs[0] for several in idle]
    for branch, outputs, body in (
        ("then_branch", list(on), list(nodes)),
        ("else_branch", off, [node for several in idle for node in several]),
    ):
        gate.attributes[branch] = ir.AttrGraph(branch, ir.Graph([], outputs, nodes=body, name=f"{name}_{branch}"))


def list_ancestors(value: ir.Value) -> Iterator[ir.Node]:
    """Yield the nodes from which a value is computed."""
    visited: set[ir.Node] = set()
    todo = [value.producer()]
    while todo:
        node = todo.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        yield node
        todo.extend(v.producer() for v in node.inputs if v is not None)
