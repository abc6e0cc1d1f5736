"""Gates of branches: an ``If`` on a branch's strength, or a ``Where``, so an idle branch changes nothing.

``run_site`` emits ``y + t·(y' − base)`` per branch, with the product cast to the dtype of y. For an ``If``, all nodes
that only y' needs move into its first graph. The second graph returns y if t is 0, so an idle branch is not computed,
and its zeros cannot become NaN. A ``Where`` computes the branch and discards the result, for targets without
conditional graphs.

Nodes that only branches need, such as a pass of the base or values that adapters compute once per call, move into a
separate ``If``, which runs if any of the branches does. Nodes that only some branches need, such as a pass in which one
adapter acts alone, move into another ``If``. An idle branch neither reads nor writes its cache.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from lorac.backends.onnx.shared_gates import (
    READS_SIZES,
    fill_branches,
    gate_shared_nodes,
    list_ancestors,
    placeholder_nodes,
    unshaped_result,
)
from lorac.ir.graph.attention_ops import is_past_input, present_name
from lorac.ir.graph.graph import SlotInput
from lorac.ir.slots.roles import is_strength, slot_name
from lorac.target.dialect import BranchGate


def gate_by_if(model: ir.Model, slots: Mapping[str, SlotInput]) -> None:
    """Move the branches of a model into ``If`` nodes, in place.

    model: a model whose slot inputs have their public names.
        model: its slot inputs have their public names.
        slots: the slot inputs by public name.
    """
    ends = _find_branch_ends(model, slots)
    calls = Counter(strength for strength, _ in ends)
    gates = []
    for strength, add in ends:
        end, slot = _BranchEnd.of(strength, add), slots[str(strength.name)]
        branch = slot_name(slot.site, slot.role.rpartition(".")[0])
        # If a site is called several times, its extra output comes from the last call, and stays outside of all gates.
        outputs = model.graph.outputs if calls[strength] == 1 else ()
        emitted = [value for value in outputs if str(value.name).partition(":")[2] == branch]
        by_row = _gate_rows(model.graph, end) if slot.placed else end
        gates.append(_move_into_if(model.graph, by_row, emitted))
    if gates:
        gate_shared_nodes(model.graph, gates, slots)


def gate_by_where(model: ir.Model, slots: Mapping[str, SlotInput]) -> None:
    """Insert ``Where`` nodes after the sums at the end of branches, in place; arguments as for ``gate_by_if``."""
    for strength, add in _find_branch_ends(model, slots):
        _insert_where(model.graph, _BranchEnd.of(strength, add))


def leave_ungated(model: ir.Model, slots: Mapping[str, SlotInput]) -> None:
    """Leave a model unchanged; a branch that is off is multiplied by 0."""


GATES: Mapping[BranchGate, Callable[[ir.Model, Mapping[str, SlotInput]], None]] = {
    BranchGate.NONE: leave_ungated,
    BranchGate.IF: gate_by_if,
    BranchGate.WHERE: gate_by_where,
}
"""Form of gates -> the function that puts them into a model."""


@dataclass(frozen=True)
class _BranchEnd:
    """The end of a branch: the node that adds the branch's change.

    Attributes:
        strength: the strength of the branch.
        node: the node that adds the change.
        passed: the value without the change.
    """

    strength: ir.Value
    node: ir.Node
    passed: ir.Value

    @classmethod
    def of(cls, strength: ir.Value, add: ir.Node) -> "_BranchEnd":
        """Return the end of a branch whose sum is ``add``; earlier branches of the site must be gated already."""
        free = (
            value
            for value in add.inputs
            if value is not None
            and all(strength not in node.inputs for node in list_ancestors(value) if node.op_type != READS_SIZES)
        )
        return cls(strength, add, next(free))


def _find_branch_ends(model: ir.Model, slots: Mapping[str, SlotInput]) -> list[tuple[ir.Value, ir.Node]]:
    """Return the strength of every branch, and the node that adds the branch's change."""
    strengths = {name for name, slot in slots.items() if is_strength(slot.role)}
    return [
        (value, add)
        for value in model.graph.inputs
        if value.name in strengths
        for scaled in value.consumers()
        if scaled.op_type != READS_SIZES
        for add in _walk_sums(scaled.outputs[0])
    ]


def _gate_rows(graph: ir.Graph, end: _BranchEnd) -> _BranchEnd:
    """Insert a ``Where`` that keeps the exact bits of rows with strength 0; return the end of the branch after it.

    The end is the node that joins segments of rows, if that node is the only reader of the ``Where``.
    """
    select, before = _insert_where(graph, end), end.passed.producer()
    readers = list(select.outputs[0].consumers())
    gated = _BranchEnd(end.strength, select, end.passed)
    if len(readers) != 1 or readers[0].op_type != "Reshape" or before is None or before.op_type != "Reshape":
        return gated
    whole, joined = before.inputs[0], readers[0].outputs[0]
    return _BranchEnd(end.strength, readers[0], whole) if whole is not None and whole.shape == joined.shape else gated


def _walk_sums(scaled: ir.Value) -> Iterator[ir.Node]:
    """Yield the nodes that read a branch's scaled change, also through casts."""
    for node in scaled.consumers():
        if node.op_type == "Cast":
            yield from _walk_sums(node.outputs[0])
        else:
            yield node


def _insert_where(graph: ir.Graph, end: _BranchEnd) -> ir.Node:
    old = end.node.outputs[0]
    cast = ir.Node("", "Cast", [end.strength], {"to": ir.AttrInt64("to", ir.DataType.BOOL)})
    chosen = ir.val(f"{old.name}_gated", type=old.type, shape=old.shape)
    select = ir.Node("", "Where", [cast.outputs[0], old, end.passed], outputs=[chosen])
    for node in (cast, select):
        node.metadata_props.update(end.node.metadata_props)
    graph.insert_after(end.node, [cast, select])
    old.replace_all_uses_with(chosen, replace_graph_outputs=True)
    select.replace_input_with(1, old)
    return select


def _move_into_if(graph: ir.Graph, end: _BranchEnd, emitted: Sequence[ir.Value]) -> ir.Node:
    """Move a branch into an ``If``, with the extra outputs that only it computes; return the ``If``."""
    strength, add, passed = end.strength, end.node, end.passed
    # The cache outputs that the branch writes -> the cache inputs that they extend.
    pasts = {present_name(str(value.name)): value for value in graph.inputs if is_past_input(str(value.name))}
    presents = [value for value in graph.outputs if value.name in pasts]
    reads = [value for value in add.inputs if value is not None and presents]
    branch = {node for value in reads for node in list_ancestors(value)}.difference(list_ancestors(passed))
    updated = {value: pasts[str(value.name)] for value in presents if value.producer() in branch}
    cone = _branch_nodes(add, passed, [*emitted, *updated])
    old, extra = add.outputs[0], [value for value in (*emitted, *updated) if value.producer() in cone]
    taken = [node for node in graph if node in cone]
    switch = ir.val(
        f"{old.name}_on", dtype=ir.DataType.BOOL, shape=ir.Shape([1] if len(strength.shape or ()) == 1 else [])
    )
    if strength.shape is None or len(strength.shape) > 1:  # one per place: a branch is on if any is not 0
        largest = ir.val(f"{switch.name}_sum", type=strength.type, shape=ir.Shape([]))
        graph.insert_before(add, ir.node("ReduceL1", [strength], {"keepdims": 0}, outputs=[largest]))
        strength = largest
    graph.insert_before(add, ir.node("Cast", [strength], {"to": ir.DataType.BOOL}, outputs=[switch]))
    result = ir.val(f"{old.name}_gated", type=old.type, shape=old.shape)
    results = [result, *(unshaped_result(value) for value in extra)]
    gate = ir.Node("", "If", [switch], outputs=results)
    gate.metadata_props.update(add.metadata_props)
    graph.insert_before(add, gate)
    old.replace_all_uses_with(result, replace_graph_outputs=True)
    given = dict(zip(extra, results[1:], strict=True))  # the branch itself still reads its extra outputs directly
    graph.outputs[:] = [given.get(value, value) for value in graph.outputs]
    for node in taken:
        graph.remove(node)
    idle = [
        _identity_nodes(passed, old),
        *(_identity_nodes(updated[value], value) if value in updated else placeholder_nodes(value) for value in extra),
    ]
    fill_branches(gate, f"{old.name}", [old, *extra], taken, idle)
    return gate


def _identity_nodes(value: ir.Value, like: ir.Value) -> list[ir.Node]:
    """Return a node that returns a value in place of another one."""
    passed_on = ir.val(f"{like.name}_off", type=like.type, shape=like.shape)
    return [ir.Node("", "Identity", [value], outputs=[passed_on])]


def _branch_nodes(add: ir.Node, passed: ir.Value, emitted: Sequence[ir.Value]) -> set[ir.Node]:
    """Return the nodes that only ``add`` and extra outputs need, without the nodes that ``passed`` needs.

    An extra output that other nodes read or compute stays outside, with the nodes that it needs.
    """
    spared = set(list_ancestors(passed))
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
