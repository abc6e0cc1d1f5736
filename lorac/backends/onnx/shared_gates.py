"""Gates of shared nodes: nodes that only gated branches need run only if one of these branches does."""

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

READS_SIZES = "Shape"
"""The op whose result does not depend on the content of a slot."""
_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "Attention", "MatMulNBits", "MatMulBnb4", "Einsum", "FusedMatMul"})
"""Ops that are worth a gate."""


def gate_shared_nodes(graph: ir.Graph, gates: Sequence[ir.Node], slots: Collection[str]) -> None:
    """Move nodes that only gated branches need into an ``If`` that runs if any of these branches does."""
    within = {id(gate.attributes["then_branch"].as_graph()): gate for gate in gates}
    shared = _nodes_only_for_gates(graph, gates, within)
    if not any(node.op_type in _PRODUCTS for node in shared):
        return
    # Products fuse with layout ops of slots, such as transpositions, only in one graph: each branch gets copies.
    stored: set[ir.Node] = set()
    for node in shared:
        known = (v is None or v.name in slots or v.is_initializer() or v.producer() in stored for v in node.inputs)
        if node.op_type not in _PRODUCTS and all(known):
            stored.add(node)
    for node in [node for node in shared if node in stored]:
        for user in {user for output in node.outputs for user in output.consumers() if id(user.graph) in within}:
            _copy_layouts_for(user, stored)
    _annotate_sizes(shared)
    readers: dict[ir.Node, frozenset[ir.Node]] = {}  # node -> the gates whose branches need it, directly or not
    for node in reversed(shared):
        users = {user for output in node.outputs for user in output.consumers()}
        sets = [readers[user] if user in readers else frozenset({within[id(user.graph)]}) for user in users]
        readers[node] = frozenset().union(*sets)
    shared = _leave_outside(graph, shared, readers)
    readers = {node: readers[node] for node in shared}
    reading = [gate for gate in gates if gate in frozenset().union(*readers.values())]
    switches = dict.fromkeys(value for gate in reading if (value := gate.inputs[0]) is not None)
    computed = [node for value in switches for node in reversed([*list_ancestors(value)])]
    for node in computed:
        graph.remove(node)
    graph.insert_before(next(node for node in graph if node in set(reading)), computed)
    for part in _split_by_readers(shared, readers):
        moved = set(part)
        outer = {user for node in part for output in node.outputs for user in output.consumers()} - moved
        needed = [v for node in part for v in node.outputs if any(user in outer for user in v.consumers())]
        of_part = frozenset().union(*(readers[node] for node in part))
        _move_into_shared_if(graph, part, needed, [gate for gate in gates if gate in of_part])


def _annotate_sizes(nodes: Sequence[ir.Node]) -> None:
    """Annotate sizes as one-dimensional, since the exporter leaves them untyped."""
    for node in nodes:
        value = node.outputs[0]
        known = [given for given in node.inputs if given is not None and given.shape is not None]
        flat = all(len(given.shape or ()) == 1 for given in known)
        concatenated = node.op_type == "Concat" and bool(known) and flat
        reshaped = node.op_type == "Reshape" and known[-1:] == [node.inputs[1]] and known[-1].shape == (1,)
        if value.shape is None and (concatenated or reshaped or node.op_type == READS_SIZES):
            value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([None])


def _leave_outside(
    graph: ir.Graph, shared: Sequence[ir.Node], readers: Mapping[ir.Node, frozenset[ir.Node]]
) -> list[ir.Node]:
    """Leave out gates' nodes that read no shared product, such as sizes: these need not wait for one.

    If a remaining node reads one of these, it is computed before the first gate that reads a product.
    """
    gates = frozenset().union(*(readers[node] for node in shared if node.op_type in _PRODUCTS))
    kept = [node for node in shared if readers[node] <= gates]
    outside = set(shared).difference(kept)
    read = {
        node for one in kept for value in one.inputs if value is not None for node in list_ancestors(value)
    } & outside
    early = [node for node in shared if node in read]
    for node in early:
        graph.remove(node)
    graph.insert_before(next(node for node in graph if node in gates), early)
    return kept


def _split_by_readers(shared: Sequence[ir.Node], readers: Mapping[ir.Node, frozenset[ir.Node]]) -> list[list[ir.Node]]:
    """Split nodes into ordered lists that read no later list: first for all gates, then for some of them.

    Gates that need a common node belong to one list, and so do overlapping sets of gates, except sets that overlap with
    every other set. A list without a product is not worth a gate.
    """
    sets = list(dict.fromkeys(readers.values()))
    narrow = [gates for gates in sets if any(gates.isdisjoint(other) for other in sets)]
    groups: list[frozenset[ir.Node]] = []
    for gates in narrow:
        overlapping = [group for group in groups if not group.isdisjoint(gates)]
        groups = [*(group for group in groups if group not in overlapping), gates.union(*overlapping)]
    apart = [[node for node in shared if readers[node] in narrow and readers[node] <= group] for group in groups]
    apart = [part for part in apart if any(node.op_type in _PRODUCTS for node in part)]
    left = set(shared).difference(*apart)
    common = [node for node in shared if node in left]
    return [part for part in (common, *apart) if part]


def _copy_layouts_for(user: ir.Node, stored: Collection[ir.Node]) -> None:
    """Give a node its own copies of those ``stored`` nodes that it reads."""
    for index, value in enumerate(user.inputs):
        node = None if value is None else value.producer()
        if value is None or node is None or node not in stored or node.graph is user.graph:
            continue
        outputs = [ir.val(f"{v.name}_of_{user.outputs[0].name}", type=v.type, shape=v.shape) for v in node.outputs]
        copy = ir.Node(node.domain, node.op_type, node.inputs, node.attributes.values(), outputs=outputs)
        copy.metadata_props.update(node.metadata_props)
        assert isinstance(user.graph, ir.Graph)
        user.graph.insert_before(user, copy)
        user.replace_input_with(index, outputs[value.index() or 0])
        _copy_layouts_for(copy, stored)


def _nodes_only_for_gates(graph: ir.Graph, gates: Sequence[ir.Node], within: Mapping[int, ir.Node]) -> list[ir.Node]:
    """Return in order the nodes that only gated branches read and that read no gate."""
    behind: set[ir.Node] = set(gates)
    for node in graph:
        if any(value is not None and value.producer() in behind for value in node.inputs):
            behind.add(node)
    found: set[ir.Node] = set()
    for node in reversed(graph):
        users = {user for output in node.outputs for user in output.consumers()}
        bound = node in behind or not users or any(output.is_graph_output() for output in node.outputs)
        if not bound and all(user in found or id(user.graph) in within for user in users):
            found.add(node)
    return [node for node in graph if node in found]


def _move_into_shared_if(
    graph: ir.Graph, shared: Sequence[ir.Node], needed: Sequence[ir.Value], readers: Sequence[ir.Node]
) -> None:
    """Compute ``needed`` by the nodes ``shared``, only if one of the gates that read them is on."""
    switches = [value for value in dict.fromkeys(gate.inputs[0] for gate in readers) if value is not None]
    first = next(node for node in graph if node in set(readers))
    made: list[ir.Node] = []
    on = switches[0]
    for other in switches[1:]:
        made.append(ir.Node("", "Or", [on, other]))
        on = made[-1].outputs[0]
        axes = max(len(value.shape or ()) for value in switches)
        on.type, on.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([1] * axes)
    results = [unshaped_result(value) for value in needed]
    gate = ir.Node("", "If", [on], outputs=results)
    graph.insert_before(first, [*made, gate])
    inside = set(shared)
    for value, result in zip(needed, results, strict=True):
        for user, index in [use for use in value.uses() if use.node not in inside]:
            user.replace_input_with(index, result)
    for node in shared:
        graph.remove(node)
    fill_branches(gate, "shared", needed, shared, [placeholder_nodes(value) for value in needed])


# ── Parts of gates ───────────────────────────────────────────────────────────────────────────────────────────────────
def unshaped_result(value: ir.Value) -> ir.Value:
    """Return the result of a gate for a value, of unknown sizes, since an idle gate returns other sizes."""
    return ir.val(f"{value.name}_gated", type=value.type, shape=_unknown_shape(value))


def placeholder_nodes(value: ir.Value) -> list[ir.Node]:
    """Return nodes that make a placeholder tensor of a value's dtype and rank; the last node returns it."""
    assert value.type is not None
    axes = len(_unknown_shape(value))
    shape = ir.tensor([1] * axes, dtype=ir.DataType.INT64, name=f"{value.name}_ones")
    size = ir.val(f"{value.name}_ones", dtype=ir.DataType.INT64, shape=ir.Shape([axes]))
    constant = ir.Node("", "Constant", [], {"value": ir.AttrTensor("value", shape)}, outputs=[size])
    zero = ir.tensor(np.zeros(1, value.type.dtype.numpy()), name=f"{value.name}_zero")
    result = ir.val(f"{value.name}_idle", type=value.type, shape=_unknown_shape(value))
    return [constant, ir.Node("", "ConstantOfShape", [size], {"value": ir.AttrTensor("value", zero)}, outputs=[result])]


def _unknown_shape(value: ir.Value) -> ir.Shape:
    """Return a shape with a value's rank and unknown sizes."""
    assert value.shape is not None
    return ir.Shape([None] * len(value.shape))


def fill_branches(
    gate: ir.Node, name: str, on: Sequence[ir.Value], nodes: Sequence[ir.Node], idle: Sequence[Sequence[ir.Node]]
) -> None:
    """Set a gate's two graphs: ``nodes`` compute the values ``on``, and ``idle`` compute their replacements."""
    off = [several[-1].outputs[0] for several in idle]
    for branch, outputs, body in (
        ("then_branch", list(on), list(nodes)),
        ("else_branch", off, [node for several in idle for node in several]),
    ):
        gate.attributes[branch] = ir.AttrGraph(branch, ir.Graph([], outputs, nodes=body, name=f"{name}_{branch}"))


def list_ancestors(value: ir.Value) -> Iterator[ir.Node]:
    """Yield the nodes that a value depends on."""
    visited: set[ir.Node] = set()
    todo = [value.producer()]
    while todo:
        node = todo.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        yield node
        todo.extend(v.producer() for v in node.inputs if v is not None)
