"""Branches that are off leave no trace: each goes into an ``If`` on its strength, or behind a ``Where``.

``run_site`` emits ``y + t·(y' − base)`` per branch, the product cast to the dtype of y. As an ``If``, everything that
only y' needs moves into its first graph; where t is 0 the second passes y on, so an idle branch is neither computed nor
can its zeros turn into NaN. A ``Where`` computes it and drops the result, for targets that run no conditional graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import onnx_ir as ir

from lorac.ir.engine import Gate
from lorac.ir.graph.graph import SlotInput
from lorac.ir.slots.roles import is_strength


def gate_by_if(model: ir.Model, slots: Mapping[str, SlotInput]) -> None:
    """Move the branches of a model into ``If`` nodes, in place.

    Args:
        model: as emitted; its slot inputs bear their public names.
        slots: the slot inputs by public name.
    """
    for strength, add in _ends(model, slots):
        _into_if(model.graph, strength, add)


def gate_by_where(model: ir.Model, slots: Mapping[str, SlotInput]) -> None:
    """Put the sums that branches end in behind ``Where`` nodes, in place; arguments as ``gate_by_if``'s."""
    for strength, add in _ends(model, slots):
        _behind_where(model.graph, strength, add)


def leave(model: ir.Model, slots: Mapping[str, SlotInput]) -> None:
    """Nothing: what is off stays a product with 0."""


GATES: Mapping[Gate, Callable[[ir.Model, Mapping[str, SlotInput]], None]] = {
    Gate.NONE: leave,
    Gate.IF: gate_by_if,
    Gate.WHERE: gate_by_where,
}
"""Form of gates -> what puts them into a model."""


def _ends(model: ir.Model, slots: Mapping[str, SlotInput]) -> list[tuple[ir.Value, ir.Node]]:
    """The strength of every branch, and the sum that the branch ends in."""
    strengths = {name for name, slot in slots.items() if is_strength(slot.role)}
    return [
        (value, add)
        for value in model.graph.inputs
        if value.name in strengths
        for scaled in value.consumers()
        for add in _sums(scaled.outputs[0])
    ]


def _sums(scaled: ir.Value) -> Iterator[ir.Node]:
    """What reads a branch's scaled change, in whatever dtype."""
    for node in scaled.consumers():
        if node.op_type == "Cast":
            yield from _sums(node.outputs[0])
        else:
            yield node


def _passed(strength: ir.Value, add: ir.Node) -> ir.Value:
    """The operand of a branch's sum that holds without the branch."""
    return next(v for v in add.inputs if v is not None and not _depends_on(v, strength))


def _behind_where(graph: ir.Graph, strength: ir.Value, add: ir.Node) -> None:
    old, passed = add.outputs[0], _passed(strength, add)
    cast = ir.Node("", "Cast", [strength], {"to": ir.AttrInt64("to", ir.DataType.BOOL)})
    chosen = ir.val(f"{old.name}_gated", type=old.type, shape=old.shape)
    select = ir.Node("", "Where", [cast.outputs[0], old, passed], outputs=[chosen])
    for node in (cast, select):
        node.metadata_props.update(add.metadata_props)
    graph.insert_after(add, [cast, select])
    old.replace_all_uses_with(chosen, replace_graph_outputs=True)
    select.replace_input_with(1, old)


def _into_if(graph: ir.Graph, strength: ir.Value, add: ir.Node) -> None:
    passed = _passed(strength, add)
    cone = _cone(add, passed)
    old = add.outputs[0]
    taken = [node for node in graph if node in cone]
    switch = ir.val(f"{old.name}_on", dtype=ir.DataType.BOOL, shape=ir.Shape([1]))
    cast = ir.Node("", "Cast", [strength], {"to": ir.AttrInt64("to", ir.DataType.BOOL)}, outputs=[switch])
    graph.insert_before(add, cast)
    result = ir.val(f"{old.name}_gated", type=old.type, shape=old.shape)
    gate = ir.Node("", "If", [switch], outputs=[result])
    gate.metadata_props.update(add.metadata_props)
    graph.insert_before(add, gate)
    old.replace_all_uses_with(result, replace_graph_outputs=True)
    for node in taken:
        graph.remove(node)
    kept = ir.val(f"{old.name}_off", type=old.type, shape=old.shape)
    idle = ir.Node("", "Identity", [passed], outputs=[kept])
    for name, output, nodes in (("then_branch", old, taken), ("else_branch", kept, [idle])):
        gate.attributes[name] = ir.AttrGraph(name, ir.Graph([], [output], nodes=nodes, name=f"{old.name}_{name}"))


def _cone(add: ir.Node, passed: ir.Value) -> set[ir.Node]:
    """The nodes that nothing but ``add`` needs, those behind ``passed`` excepted."""
    spared = set(_ancestors(passed))
    cone, todo = {add}, [add]
    while todo:
        made = {value.producer() for value in todo.pop().inputs if value is not None}
        found = [n for n in made if n is not None and n not in cone and n not in spared and _only_for(n, cone)]
        cone.update(found)
        todo.extend(found)
    return cone


def _only_for(node: ir.Node, cone: set[ir.Node]) -> bool:
    """Whether nothing outside the cone reads what a node computes."""
    users = {user for output in node.outputs for user in output.consumers()}
    return users <= cone and not any(output.is_graph_output() for output in node.outputs)


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
