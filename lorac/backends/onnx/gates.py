"""Gates of branches: an ``If`` on a branch's strength, or a ``Where``, so that an idle branch changes nothing.

``run_site`` emits ``y + t·(y' − base)`` per branch, the product cast to the dtype of y. In an ``If``, everything that
only y' needs moves into the first graph. The second graph passes y on where t is 0, so that an idle branch is not
computed and its zeros cannot turn into NaN. A ``Where`` computes the branch and drops the result, for targets that run
no conditional graphs.

Nodes that only branches need, such as a pass of the base or values that adapters compute once per call, move into one
``If`` of their own, which runs if one of the branches does. Nodes that only some branches need, such as a pass in which
one adapter acts alone, move into another one. An idle branch neither reads nor writes its cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from lorac.ir.graph.attention_ops import is_past_input, present_name
from lorac.ir.graph.graph import SlotInput
from lorac.ir.slots.roles import is_strength, slot_name
from lorac.target.dialect import BranchGate


def gate_by_if(model: ir.Model, slots: Mapping[str, SlotInput]) -> None:
    """Move the branches of a model into ``If`` nodes, in place.

    Args:
        model: its slot inputs have their public names.
        slots: the slot inputs by public name.
    """
    ends = _find_branch_ends(model, slots)
    calls = Counter(strength for strength, _ in ends)
    gates = []
    for strength, add in ends:
        # An extra output of a site that is called several times is the last call's, and stays outside of all gates.
        emitted = _emitted_outputs(model.graph, slots[str(strength.name)]) if calls[strength] == 1 else []
        gates.append(_move_into_if(model.graph, strength, add, emitted))
    _gate_shared_nodes(model.graph, gates, slots)


def gate_by_where(model: ir.Model, slots: Mapping[str, SlotInput]) -> None:
    """Put the sums at the end of branches behind ``Where`` nodes, in place; arguments as for ``gate_by_if``."""
    for strength, add in _find_branch_ends(model, slots):
        _insert_where(model.graph, strength, add)


def leave_ungated(model: ir.Model, slots: Mapping[str, SlotInput]) -> None:
    """Leave a model alone: a branch that is off is multiplied by 0."""


GATES: Mapping[BranchGate, Callable[[ir.Model, Mapping[str, SlotInput]], None]] = {
    BranchGate.NONE: leave_ungated,
    BranchGate.IF: gate_by_if,
    BranchGate.WHERE: gate_by_where,
}
"""Form of gates -> the function that puts them into a model."""


def _find_branch_ends(model: ir.Model, slots: Mapping[str, SlotInput]) -> list[tuple[ir.Value, ir.Node]]:
    """Return the strength of every branch, with the sum at the branch's end."""
    strengths = {name for name, slot in slots.items() if is_strength(slot.role)}
    return [
        (value, add)
        for value in model.graph.inputs
        if value.name in strengths
        for scaled in value.consumers()
        for add in _walk_sums(scaled.outputs[0])
    ]


def _emitted_outputs(graph: ir.Graph, strength: SlotInput) -> list[ir.Value]:
    """Return the extra outputs of a branch, which the slot of its strength identifies."""
    branch = slot_name(strength.site, strength.role.rpartition(".")[0])
    return [value for value in graph.outputs if str(value.name).partition(":")[2] == branch]


def _walk_sums(scaled: ir.Value) -> Iterator[ir.Node]:
    """Yield the nodes that read a branch's scaled change, in whatever dtype."""
    for node in scaled.consumers():
        if node.op_type == "Cast":
            yield from _walk_sums(node.outputs[0])
        else:
            yield node


def _base_operand(strength: ir.Value, add: ir.Node) -> ir.Value:
    """Return the operand of a branch's sum that does not depend on the branch."""
    return next(v for v in add.inputs if v is not None and not _depends_on(v, strength))


def _insert_where(graph: ir.Graph, strength: ir.Value, add: ir.Node) -> None:
    old, passed = add.outputs[0], _base_operand(strength, add)
    cast = ir.Node("", "Cast", [strength], {"to": ir.AttrInt64("to", ir.DataType.BOOL)})
    chosen = ir.val(f"{old.name}_gated", type=old.type, shape=old.shape)
    select = ir.Node("", "Where", [cast.outputs[0], old, passed], outputs=[chosen])
    for node in (cast, select):
        node.metadata_props.update(add.metadata_props)
    graph.insert_after(add, [cast, select])
    old.replace_all_uses_with(chosen, replace_graph_outputs=True)
    select.replace_input_with(1, old)


def _move_into_if(graph: ir.Graph, strength: ir.Value, add: ir.Node, emitted: Sequence[ir.Value]) -> ir.Node:
    """Move a branch into an ``If``, with the extra outputs that only it computes, and return the ``If``."""
    passed = _base_operand(strength, add)
    updated = _find_cache_updates(graph, add, passed)
    cone = _branch_nodes(add, passed, [*emitted, *updated])
    old, extra = add.outputs[0], [value for value in (*emitted, *updated) if value.producer() in cone]
    taken = [node for node in graph if node in cone]
    switch = ir.val(f"{old.name}_on", dtype=ir.DataType.BOOL, shape=ir.Shape([1]))
    cast = ir.Node("", "Cast", [strength], {"to": ir.AttrInt64("to", ir.DataType.BOOL)}, outputs=[switch])
    graph.insert_before(add, cast)
    result = ir.val(f"{old.name}_gated", type=old.type, shape=old.shape)
    results = [result, *(_unshaped_result(value) for value in extra)]
    gate = ir.Node("", "If", [switch], outputs=results)
    gate.metadata_props.update(add.metadata_props)
    graph.insert_before(add, gate)
    old.replace_all_uses_with(result, replace_graph_outputs=True)
    given = dict(zip(extra, results[1:], strict=True))  # the branch itself goes on to read what it emits
    graph.outputs[:] = [given.get(value, value) for value in graph.outputs]
    for node in taken:
        graph.remove(node)
    idle = [
        _identity_nodes(passed, old),
        *(_identity_nodes(updated[value], value) if value in updated else _placeholder_nodes(value) for value in extra),
    ]
    _fill_branches(gate, f"{old.name}", [old, *extra], taken, idle)
    return gate


def _find_cache_updates(graph: ir.Graph, add: ir.Node, passed: ir.Value) -> dict[ir.Value, ir.Value]:
    """Return each cache output that a branch writes -> the cache input that it extends."""
    pasts = {present_name(str(value.name)): value for value in graph.inputs if is_past_input(str(value.name))}
    presents = [value for value in graph.outputs if value.name in pasts]
    if not presents:
        return {}
    branch = {node for value in add.inputs if value is not None for node in _ancestors(value)} - set(_ancestors(passed))
    return {value: pasts[str(value.name)] for value in presents if value.producer() in branch}


def _identity_nodes(value: ir.Value, like: ir.Value) -> list[ir.Node]:
    """Return a node that passes a value on in the place of another."""
    passed_on = ir.val(f"{like.name}_off", type=like.type, shape=like.shape)
    return [ir.Node("", "Identity", [value], outputs=[passed_on])]


def _fill_branches(
    gate: ir.Node, name: str, on: Sequence[ir.Value], nodes: Sequence[ir.Node], idle: Sequence[Sequence[ir.Node]]
) -> None:
    """Give a gate its two graphs: ``nodes`` compute the values ``on``, and ``idle`` the values in their place."""
    off = [several[-1].outputs[0] for several in idle]
    for branch, outputs, body in (
        ("then_branch", list(on), list(nodes)),
        ("else_branch", off, [node for several in idle for node in several]),
    ):
        gate.attributes[branch] = ir.AttrGraph(branch, ir.Graph([], outputs, nodes=body, name=f"{name}_{branch}"))


# ── What branches share ──────────────────────────────────────────────────────────────────────────────────────────────
_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "Attention", "MatMulNBits", "MatMulBnb4", "Einsum", "FusedMatMul"})
"""Ops that are worth a gate."""


def _gate_shared_nodes(graph: ir.Graph, gates: Sequence[ir.Node], slots: Collection[str]) -> None:
    """Move nodes that only gated branches need into an ``If`` that runs if one of the branches does."""
    within = {id(gate.attributes["then_branch"].as_graph()): gate for gate in gates}
    shared = _nodes_only_for_gates(graph, gates, within)
    if not any(node.op_type in _PRODUCTS for node in shared):
        return
    _duplicate_layouts(shared, within, slots)
    _annotate_sizes(shared)
    readers = _gates_reading(shared, within)
    _hoist_switches(graph, [gate for gate in gates if gate in frozenset().union(*readers.values())])
    for part in _split_by_readers(shared, readers):
        moved = set(part)
        outer = {user for node in part for output in node.outputs for user in output.consumers()} - moved
        needed = [v for node in part for v in node.outputs if any(user in outer for user in v.consumers())]
        of_part = frozenset().union(*(readers[node] for node in part))
        _move_into_shared_if(graph, part, needed, [gate for gate in gates if gate in of_part])


def _annotate_sizes(nodes: Sequence[ir.Node]) -> None:
    """Annotate concatenated sizes, which the exporter leaves untyped, as one-dimensional."""
    for node in nodes:
        value = node.outputs[0]
        if node.op_type != "Concat" or value.shape is not None:
            continue
        known = [given for given in node.inputs if given is not None and given.shape is not None]
        if known and all(len(given.shape or ()) == 1 for given in known):
            value.type, value.shape = known[0].type, ir.Shape([None])


def _gates_reading(shared: Sequence[ir.Node], within: Mapping[int, ir.Node]) -> dict[ir.Node, frozenset[ir.Node]]:
    """Return node -> the gates whose branches need it, directly or through other nodes."""
    found: dict[ir.Node, frozenset[ir.Node]] = {}
    for node in reversed(shared):
        users = {user for output in node.outputs for user in output.consumers()}
        sets = [found[user] if user in found else frozenset({within[id(user.graph)]}) for user in users]
        found[node] = frozenset().union(*sets)
    return found


def _split_by_readers(shared: Sequence[ir.Node], readers: Mapping[ir.Node, frozenset[ir.Node]]) -> list[list[ir.Node]]:
    """Split nodes into lists in order, of which none reads a later one: for all gates first, then for some of them.

    Gates that need one node belong together, and so do sets of gates that overlap, except those that overlap with every
    other set. A list without a product is not worth a gate.
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


def _hoist_switches(graph: ir.Graph, gates: Sequence[ir.Node]) -> None:
    """Move the switches of gates before the first gate."""
    switches = dict.fromkeys(value for gate in gates if (value := gate.inputs[0]) is not None)
    casts = [cast for value in switches if (cast := value.producer()) is not None]
    for cast in casts:
        graph.remove(cast)
    graph.insert_before(next(node for node in graph if node in set(gates)), casts)


def _duplicate_layouts(shared: Sequence[ir.Node], within: Mapping[int, ir.Node], slots: Collection[str]) -> None:
    """Give each branch its own copies of ops that lay out slots, such as transpositions.

    Products fuse with such ops if they are in the same graph.
    """
    stored: set[ir.Node] = set()
    for node in shared:
        known = (v is None or v.name in slots or v.is_initializer() or v.producer() in stored for v in node.inputs)
        if node.op_type not in _PRODUCTS and all(known):
            stored.add(node)
    for node in [node for node in shared if node in stored]:
        for user in {user for output in node.outputs for user in output.consumers() if id(user.graph) in within}:
            _copy_layouts_for(user, stored)


def _copy_layouts_for(user: ir.Node, stored: Collection[ir.Node]) -> None:
    """Give a node its own copies of the ``stored`` nodes that it reads."""
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
    """Return the nodes that only gated branches read and that read no gate, in order."""
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
    """Compute ``needed`` by the nodes ``shared`` only if one of the gates that read them is on."""
    switches = [value for value in dict.fromkeys(gate.inputs[0] for gate in readers) if value is not None]
    first = next(node for node in graph if node in set(readers))
    made: list[ir.Node] = []
    on = switches[0]
    for other in switches[1:]:
        made.append(ir.Node("", "Or", [on, other]))
        on = made[-1].outputs[0]
        on.type, on.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([1])
    results = [_unshaped_result(value) for value in needed]
    gate = ir.Node("", "If", [on], outputs=results)
    graph.insert_before(first, [*made, gate])
    inside = set(shared)
    for value, result in zip(needed, results, strict=True):
        for user, index in [use for use in value.uses() if use.node not in inside]:
            user.replace_input_with(index, result)
    for node in shared:
        graph.remove(node)
    _fill_branches(gate, "shared", needed, shared, [_placeholder_nodes(value) for value in needed])


def _unshaped_result(value: ir.Value) -> ir.Value:
    """Return the result of a gate for a value, without sizes, since an idle gate returns other sizes."""
    return ir.val(f"{value.name}_gated", type=value.type, shape=_unknown_shape(value))


def _placeholder_nodes(value: ir.Value) -> list[ir.Node]:
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


# ── What one branch needs ────────────────────────────────────────────────────────────────────────────────────────────
def _branch_nodes(add: ir.Node, passed: ir.Value, emitted: Sequence[ir.Value]) -> set[ir.Node]:
    """Return the nodes that only ``add`` and extra outputs need, except those that ``passed`` needs.

    An extra output that other nodes read, or compute, stays outside with the nodes it needs.
    """
    spared = set(_ancestors(passed))
    roots = {node for value in emitted if (node := value.producer()) is not None and node not in spared}
    cone = {add, *roots}
    todo = [*cone]
    while todo:
        made = {value.producer() for value in todo.pop().inputs if value is not None}
        found = [n for n in made if n is not None and n not in cone and n not in spared and _feeds_only(n, cone)]
        cone.update(found)
        todo.extend(found)
    known = set(emitted)
    outside = {root for root in roots if not _feeds_only(root, cone, known)}
    return (
        cone
        if not outside
        else _branch_nodes(add, passed, [value for value in emitted if value.producer() not in outside])
    )


def _feeds_only(node: ir.Node, cone: set[ir.Node], emitted: Collection[ir.Value] = ()) -> bool:
    """Return whether only nodes of the branch, and extra outputs, read a node."""
    users = {user for output in node.outputs for user in output.consumers()}
    return users <= cone and not any(output.is_graph_output() and output not in emitted for output in node.outputs)


def _ancestors(value: ir.Value) -> Iterator[ir.Node]:
    visited: set[ir.Node] = set()
    todo = [value.producer()]
    while todo:
        node = todo.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        yield node
        todo.extend(v.producer() for v in node.inputs if v is not None)


def _depends_on(value: ir.Value, source: ir.Value) -> bool:
    return any(source in node.inputs for node in _ancestors(value))
