"""Branches that are off leave no trace: each goes into an ``If`` on its strength, or behind a ``Where``.

What only branches need and is computed before them all, a pass of the base and what adapters compute once per call,
goes into one ``If`` of its own, which runs where one of those branches does. What some of them need that have
nothing in common with the others, a pass that an adapter has to itself, goes into one more.

What a branch keeps in a cache, where it attends to a text that grows, it neither reads nor writes while it is off.

``run_site`` emits ``y + t·(y' − base)`` per branch, the product cast to the dtype of y. As an ``If``, everything that
only y' needs moves into its first graph; where t is 0 the second passes y on, so an idle branch is neither computed nor
can its zeros turn into NaN. A ``Where`` computes it and drops the result, for targets that run no conditional graphs.
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
        model: as emitted; its slot inputs bear their public names.
        slots: the slot inputs by public name.
    """
    ends = _find_branch_ends(model, slots)
    calls = Counter(strength for strength, _ in ends)
    gates = []
    for strength, add in ends:
        # What several calls of one site emit is that of the last: it stays outside, for none of them is that alone.
        emitted = _emitted_outputs(model.graph, slots[str(strength.name)]) if calls[strength] == 1 else []
        gates.append(_move_into_if(model.graph, strength, add, emitted))
    _gate_shared_nodes(model.graph, gates, slots)


def gate_by_where(model: ir.Model, slots: Mapping[str, SlotInput]) -> None:
    """Put the sums that branches end in behind ``Where`` nodes, in place; arguments as ``gate_by_if``'s."""
    for strength, add in _find_branch_ends(model, slots):
        _insert_where(model.graph, strength, add)


def leave_ungated(model: ir.Model, slots: Mapping[str, SlotInput]) -> None:
    """Nothing: what is off stays a product with 0."""


GATES: Mapping[BranchGate, Callable[[ir.Model, Mapping[str, SlotInput]], None]] = {
    BranchGate.NONE: leave_ungated,
    BranchGate.IF: gate_by_if,
    BranchGate.WHERE: gate_by_where,
}
"""Form of gates -> what puts them into a model."""


def _find_branch_ends(model: ir.Model, slots: Mapping[str, SlotInput]) -> list[tuple[ir.Value, ir.Node]]:
    """The strength of every branch, and the sum that the branch ends in."""
    strengths = {name for name, slot in slots.items() if is_strength(slot.role)}
    return [
        (value, add)
        for value in model.graph.inputs
        if value.name in strengths
        for scaled in value.consumers()
        for add in _walk_sums(scaled.outputs[0])
    ]


def _emitted_outputs(graph: ir.Graph, strength: SlotInput) -> list[ir.Value]:
    """The extra outputs that a branch gives, by the slot of its strength."""
    branch = slot_name(strength.site, strength.role.rpartition(".")[0])
    return [value for value in graph.outputs if str(value.name).partition(":")[2] == branch]


def _walk_sums(scaled: ir.Value) -> Iterator[ir.Node]:
    """What reads a branch's scaled change, in whatever dtype."""
    for node in scaled.consumers():
        if node.op_type == "Cast":
            yield from _walk_sums(node.outputs[0])
        else:
            yield node


def _base_operand(strength: ir.Value, add: ir.Node) -> ir.Value:
    """The operand of a branch's sum that holds without the branch."""
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
    """Move a branch, and what it alone computes of its extra outputs, into an ``If``, which is returned."""
    passed = _base_operand(strength, add)
    kept = _find_cache_updates(graph, add, passed)
    cone = _branch_nodes(add, passed, [*emitted, *kept])
    old, extra = add.outputs[0], [value for value in (*emitted, *kept) if value.producer() in cone]
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
        *(_identity_nodes(kept[value], value) if value in kept else _placeholder_nodes(value) for value in extra),
    ]
    _fill_branches(gate, f"{old.name}", [old, *extra], taken, idle)
    return gate


def _find_cache_updates(graph: ir.Graph, add: ir.Node, passed: ir.Value) -> dict[ir.Value, ir.Value]:
    """What a branch that ends in a sum adds to a cache -> what that held."""
    pasts = {present_name(str(value.name)): value for value in graph.inputs if is_past_input(str(value.name))}
    presents = [value for value in graph.outputs if value.name in pasts]
    if not presents:
        return {}
    own = {node for value in add.inputs if value is not None for node in _ancestors(value)} - set(_ancestors(passed))
    return {value: pasts[str(value.name)] for value in presents if value.producer() in own}


def _identity_nodes(value: ir.Value, like: ir.Value) -> list[ir.Node]:
    """A node that passes a value on, in the place of another."""
    passed_on = ir.val(f"{like.name}_off", type=like.type, shape=like.shape)
    return [ir.Node("", "Identity", [value], outputs=[passed_on])]


def _fill_branches(
    gate: ir.Node, name: str, on: Sequence[ir.Value], nodes: Sequence[ir.Node], idle: Sequence[Sequence[ir.Node]]
) -> None:
    """Give a gate its two graphs: ``nodes``, which compute ``on``; and for each of these those that stand for it."""
    off = [several[-1].outputs[0] for several in idle]
    for branch, outputs, body in (
        ("then_branch", list(on), list(nodes)),
        ("else_branch", off, [node for several in idle for node in several]),
    ):
        gate.attributes[branch] = ir.AttrGraph(branch, ir.Graph([], outputs, nodes=body, name=f"{name}_{branch}"))


# ── What branches share ──────────────────────────────────────────────────────────────────────────────────────────────
_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "Attention", "MatMulNBits", "MatMulBnb4", "Einsum", "FusedMatMul"})
"""Ops that make it worth while to leave out what has one."""


def _gate_shared_nodes(graph: ir.Graph, gates: Sequence[ir.Node], slots: Collection[str]) -> None:
    """Move what only gated branches need, and what none of them changes, into an ``If`` that runs where one does."""
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
    """Say of sizes that nodes join, of which the exporter tells nothing, what they are: a row of whole numbers."""
    for node in nodes:
        value = node.outputs[0]
        if node.op_type != "Concat" or value.shape is not None:
            continue
        known = [given for given in node.inputs if given is not None and given.shape is not None]
        if known and all(len(given.shape or ()) == 1 for given in known):
            value.type, value.shape = known[0].type, ir.Shape([None])


def _gates_reading(shared: Sequence[ir.Node], within: Mapping[int, ir.Node]) -> dict[ir.Node, frozenset[ir.Node]]:
    """Node -> the gates whose branches need it, be it through others of the nodes."""
    found: dict[ir.Node, frozenset[ir.Node]] = {}
    for node in reversed(shared):
        users = {user for output in node.outputs for user in output.consumers()}
        sets = [found[user] if user in found else frozenset({within[id(user.graph)]}) for user in users]
        found[node] = frozenset().union(*sets)
    return found


def _split_by_readers(shared: Sequence[ir.Node], readers: Mapping[ir.Node, frozenset[ir.Node]]) -> list[list[ir.Node]]:
    """The nodes, each list in order and none reading a later one: what all gates need first, then what few do.

    Gates that need one thing belong together, and so do all sets of gates that overlap, but those that overlap with
    every other. A part without a product is not worth a gate of its own.
    """
    sets = list(dict.fromkeys(readers.values()))
    narrow = [own for own in sets if any(own.isdisjoint(other) for other in sets)]
    groups: list[frozenset[ir.Node]] = []
    for own in narrow:
        met = [group for group in groups if not group.isdisjoint(own)]
        groups = [*(group for group in groups if group not in met), own.union(*met)]
    apart = [[node for node in shared if readers[node] in narrow and readers[node] <= group] for group in groups]
    apart = [part for part in apart if any(node.op_type in _PRODUCTS for node in part)]
    left = set(shared).difference(*apart)
    common = [node for node in shared if node in left]
    return [part for part in (common, *apart) if part]


def _hoist_switches(graph: ir.Graph, gates: Sequence[ir.Node]) -> None:
    """Have the switches of gates be there before the first of them."""
    switches = dict.fromkeys(value for gate in gates if (value := gate.inputs[0]) is not None)
    casts = [cast for value in switches if (cast := value.producer()) is not None]
    for cast in casts:
        graph.remove(cast)
    graph.insert_before(next(node for node in graph if node in set(gates)), casts)


def _duplicate_layouts(shared: Sequence[ir.Node], within: Mapping[int, ir.Node], slots: Collection[str]) -> None:
    """Have each branch lay slots out for itself, a transposition for one, as it would if nothing else read them.

    Products take such ops into themselves where they stand beside them.
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
    """Give a node copies of its own of the nodes among ``stored`` that it reads."""
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
    """Nodes that only gated branches read, in order; what reads a branch's result is none of them."""
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
    """Compute ``needed`` by the nodes ``shared`` where one of the gates that read them is on."""
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
    """What a gate gives of a value: of no shape to plan memory by, for what is idle has another."""
    return ir.val(f"{value.name}_gated", type=value.type, shape=_unknown_shape(value))


def _placeholder_nodes(value: ir.Value) -> list[ir.Node]:
    """Nodes the last of which gives a tensor of a value's type and number of axes that holds nothing of use."""
    assert value.type is not None
    axes = len(_unknown_shape(value))
    shape = ir.tensor([1] * axes, dtype=ir.DataType.INT64, name=f"{value.name}_ones")
    size = ir.val(f"{value.name}_ones", dtype=ir.DataType.INT64, shape=ir.Shape([axes]))
    constant = ir.Node("", "Constant", [], {"value": ir.AttrTensor("value", shape)}, outputs=[size])
    zero = ir.tensor(np.zeros(1, value.type.dtype.numpy()), name=f"{value.name}_zero")
    result = ir.val(f"{value.name}_idle", type=value.type, shape=_unknown_shape(value))
    return [constant, ir.Node("", "ConstantOfShape", [size], {"value": ir.AttrTensor("value", zero)}, outputs=[result])]


def _unknown_shape(value: ir.Value) -> ir.Shape:
    """As many axes as a value has, of any size."""
    assert value.shape is not None
    return ir.Shape([None] * len(value.shape))


# ── What one branch needs ────────────────────────────────────────────────────────────────────────────────────────────
def _branch_nodes(add: ir.Node, passed: ir.Value, emitted: Sequence[ir.Value]) -> set[ir.Node]:
    """The nodes that nothing but ``add`` and extra outputs need, those behind ``passed`` excepted.

    An extra output that others read, or compute, stays outside with what it needs.
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
    """Whether nothing outside the cone reads what a node computes, but for extra outputs."""
    users = {user for output in node.outputs for user in output.consumers()}
    return users <= cone and not any(output.is_graph_output() and output not in emitted for output in node.outputs)


def _ancestors(value: ir.Value) -> Iterator[ir.Node]:
    seen: set[ir.Node] = set()
    todo = [value.producer()]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        todo.extend(v.producer() for v in node.inputs if v is not None)


def _depends_on(value: ir.Value, source: ir.Value) -> bool:
    return any(source in node.inputs for node in _ancestors(value))
