"""A pass that writes circular padding as a concatenation, since OpenVINO's ``Pad`` lacks the mode ``wrap``."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from lorac.backends.onnx.passes import OnnxPass, read_numbers, shared_constant
from lorac.ir.graph.passes import PassResult

_END = np.iinfo(np.int64).max


@dataclass(frozen=True)
class JoinWrappedPadding(OnnxPass):
    """Replace each ``Pad`` of mode ``wrap`` by a concatenation of last, all and first values, axis by axis."""

    name: ClassVar[str] = "join-wrapped-padding"

    def apply(self, model: ir.Model) -> PassResult:
        """Replace the nodes in place; those with computed widths stay, and OpenVINO refuses them."""
        wrapped = [
            node
            for node in model.graph
            if node.op_type == "Pad"
            and node.attributes.get_string("mode", "") == "wrap"
            and read_numbers(node.inputs[1])
        ]
        for node in wrapped:
            _replace(model.graph, node)
        return PassResult(changed=bool(wrapped))


def _replace(graph: ir.Graph, node: ir.Node) -> None:
    widths, value, added = read_numbers(node.inputs[1]), node.inputs[0], list[ir.Node]()
    rank = len(widths) // 2
    for axis, (before, after) in enumerate(zip(widths[:rank], widths[rank:], strict=True)):
        if before == after == 0:
            continue
        ends = [(-before, _END)] * bool(before), [(0, after)] * bool(after)
        first, last = ([_slice(graph, value, axis, *bounds) for bounds in each] for each in ends)
        parts = [*(part.outputs[0] for part in first), value, *(part.outputs[0] for part in last)]
        joined = ir.Node("", "Concat", parts, [ir.AttrInt64("axis", axis)])
        added += [*first, *last, joined]
        value = joined.outputs[0]
    for each in added:
        each.metadata_props.update(node.metadata_props)
    assert value is not None
    value.shape, value.type = node.outputs[0].shape, node.outputs[0].type
    graph.insert_before(node, added)
    node.outputs[0].replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _slice(graph: ir.Graph, value: ir.Value | None, axis: int, start: int, end: int) -> ir.Node:
    bounds = [shared_constant(graph, f"index_{number}", np.array([number])) for number in (start, end, axis)]
    return ir.Node("", "Slice", [value, *bounds])
