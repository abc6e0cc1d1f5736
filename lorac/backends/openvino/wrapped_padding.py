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
        parts = [value]
        for width, start, end in ((before, -before, _END), (after, 0, after)):
            if width:  # the last values stand before all, and the first behind them
                bounds = [shared_constant(graph, f"index_{n}", np.array([n])) for n in (start, end, axis)]
                added.append(ir.Node("", "Slice", [value, *bounds]))
                parts.insert(len(parts) if start == 0 else 0, added[-1].outputs[0])
        added.append(ir.Node("", "Concat", parts, [ir.AttrInt64("axis", axis)]))
        value = added[-1].outputs[0]
    for each in added:
        each.metadata_props.update(node.metadata_props)
    assert value is not None
    value.shape, value.type = node.outputs[0].shape, node.outputs[0].type
    graph.insert_before(node, added)
    node.outputs[0].replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
