"""The verifier, which checks the rules of a graph's level after every pass."""

from torch import fx
from torch._ops import OpOverload

from lorac.errors import CompileError
from lorac.ir.graph import ops
from lorac.ir.graph.graph import Graph, Level, find_written_operands

_FORBIDDEN: dict[Level, tuple[object, ...]] = {
    Level.TRACED: (ops.adapted,),
    Level.HOST: (ops.adapted, ops.REPEATED_LAYER, ops.MARKER),
    Level.ADAPTED: (),
    Level.EXPANDED: (ops.adapted, *ops.SITE_OPS),
    Level.TARGET: (ops.adapted, *(ops.SITE_OPS - {ops.LINEAR})),
}


def verify(graph: Graph, after: str) -> None:
    """Check a graph against the rules of its level.

    Operands are computed before they are read, ops belong to the level and have types, no op writes to a base weight,
    and every slot is an input on which an output depends (invariant 8).

    Args:
        after: the pass that ran last, for the message.

    Raises:
        CompileError: naming the rule, the node and the pass.
    """
    seen: set[fx.Node] = set()
    for node in graph.fx.nodes:
        operands = node.all_input_nodes
        if not seen.issuperset(operands):
            unknown = next(operand for operand in operands if operand not in seen)
            raise _failed(after, node, f"reads {unknown.name} before it is computed")
        returns = not isinstance(node.target, OpOverload) or node.target._schema.returns  # a check of values has none
        if node.op == "call_function" and returns and "val" not in node.meta:
            raise _failed(after, node, "has no type")
        seen.add(node)
    for node in graph.find(*_FORBIDDEN[graph.level]):
        raise _failed(after, node, f"{node.target} does not belong at level {graph.level.name.lower()}")
    parameters = graph.exported.graph_signature.inputs_to_parameters
    for node in graph.find_writes():
        for operand in find_written_operands(node):
            if operand.name in parameters:
                raise _failed(after, node, f"writes to the base weight {operand.name}")
    placeholders = {node.name: node for node in graph.placeholders()}
    live = graph.reaching_outputs()
    for slot in graph.slots.values():
        node = placeholders.get(slot.node)
        if node is None:
            raise CompileError(
                f"after '{after}': slot '{slot.name}' is not an input of the graph any more", code="verification_failed"
            )
        if node not in live:
            raise _failed(after, node, f"slot '{slot.name}' reaches no output")


def _failed(after: str, node: fx.Node, what: str) -> CompileError:
    line = (node.meta.get("stack_trace") or "").strip().splitlines()
    return CompileError(
        f"after '{after}': {node.name} {what}",
        nearest=line[-2].strip() if len(line) > 1 else None,
        code="verification_failed",
    )
