"""A pass that computes recurrences only by chunks, since OpenVINO computes conditional graphs wrongly."""

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from lorac.backends.onnx.export.recurrence import BY_CHUNKS
from lorac.backends.onnx.passes import OnnxPass
from lorac.ir.graph.passes import PassResult


@dataclass(frozen=True)
class ComputeByChunks(OnnxPass):
    """Replace each ``If`` on the number of a call's tokens by its graph for many tokens, which accepts any number."""

    name: ClassVar[str] = "compute-by-chunks"

    def apply(self, model: ir.Model) -> PassResult:
        """Replace the nodes in place."""
        found = [(node, node.attributes["else_branch"].as_graph()) for node in model.graph if node.op_type == "If"]
        chunked = [(node, branch) for node, branch in found if branch.name == BY_CHUNKS]
        for node, branch in chunked:
            taken, outputs = list(branch), list(branch.outputs)
            branch.outputs.clear()
            branch.remove(taken)
            for each in taken:
                each.metadata_props.update(node.metadata_props)
                for value in each.outputs:  # branches of other nodes have values of the same names
                    value.name = f"{node.outputs[0].name}_{value.name}"
            ir.convenience.replace_nodes_and_values(model.graph, node, [node], taken, node.outputs, outputs)
        return PassResult(changed=bool(chunked))
