"""Steps that several passes over emitted programs take."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import onnx_ir as ir


def shared_constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Return a graph's constant by name, after adding it if it is missing."""
    if name not in graph.initializers:
        graph.register_initializer(ir.val(name, const_value=ir.tensor(array, name=name)))
    return graph.initializers[name]


def copy_node(node: ir.Node, inputs: Sequence[ir.Value | None], attributes: Iterable[ir.Attr] | None = None) -> ir.Node:
    """Return a node of the same op, name and metadata that reads other values, or has other attributes."""
    return ir.Node(
        node.domain,
        node.op_type,
        inputs,
        node.attributes.values() if attributes is None else attributes,
        num_outputs=len(node.outputs),
        name=node.name,
        metadata_props=dict(node.metadata_props),
    )


def nested_nodes(node: ir.Node) -> Iterator[ir.Node]:
    """Yield the nodes of the graphs within a node, however deep."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from attribute.as_graph().all_nodes()
