"""positions: positions that a decoder numbers itself become the op of ``lorac.ir.graph.attention_ops``, by row.

A sequence that arrives in parts needs separate positions for each row. So values that a decoder computes from its own
numbering (``NUMBERINGS`` in the table of families) get an axis of rows, or are looked up in a table by row. A numbering
from which attention biases are computed is not replaced: ``lorac.passes.relative_positions`` handles it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import fx
from torch.export import ExportedProgram

from lorac.errors import Unavailable
from lorac.frontend.capture.decoder_families import DEFAULT_POSITIONS, NUMBERINGS, find_sequence
from lorac.ir.graph import attention_ops
from lorac.ir.graph.attention_ops import WITHOUT_CACHE
from lorac.ir.graph.edit import add_constant, insert_call
from lorac.ir.graph.graph import Graph, Skip, find_origins
from lorac.ir.graph.interpreter import evaluate
from lorac.ir.graph.nodes import (
    find_dependents,
    find_module_path,
    find_sources,
    find_stored_tensors,
    find_user_inputs,
)
from lorac.ir.graph.ops import SITE_CALLS
from lorac.ir.graph.passes import PassResult, TracePass

aten = torch.ops.aten
_SPREADING = frozenset({aten.expand.default, aten.repeat.default})
"""Ops that repeat the same values for every row."""


@final
@dataclass(frozen=True)
class MakePositionsPerRow(TracePass):
    """Give each row separate positions if the model numbers its tokens itself; attention must be ops already."""

    name: ClassVar[str] = "positions"

    def apply(self, graph: Graph) -> PassResult:
        """Replace the numberings; skip numberings from which attention biases are computed.

        Raises:
            Unavailable: the model uses the numbers in a way that cannot differ from row to row.
        """
        program, named = graph.exported, {node.name: node for node in graph.placeholders()}
        ids, used = named[find_sequence(named).ids], graph.reaching_outputs()
        biases = (node.args[attention_ops.BIAS_OPERAND] for node in graph.find(attention_ops.ATTENTION))
        biased, skips = find_sources(biases), list[Skip]()
        found = [
            (node, first)
            for node in graph.fx.nodes
            for first, matches in NUMBERINGS
            if matches(program, node, ids) and node in used
        ]
        for node, first in found:
            if node in biased:
                skips.append(Skip(node.name, "biases of attention are computed from it"))
                continue
            by_row = insert_call(program, node, attention_ops.POSITIONS, ids)
            if first:
                counted = insert_call(program, node, aten.add.Tensor, by_row, first)
                node.replace_all_uses_with(insert_call(program, node, aten.to.dtype, counted, node.meta["val"].dtype))
            else:
                try:
                    _replace_in_users(program, node, by_row)
                except Unavailable as error:
                    _look_up(graph, ids, node, by_row, error)
        return PassResult(len(found) > len(skips), tuple(skips))


def _replace_in_users(program: ExportedProgram, node: fx.Node, by_row: fx.Node) -> None:
    """Make the readers of a value that all rows share read the value by row."""
    for user in list(node.users):
        value = user.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue  # an assertion, or a size, which is unknown for a part of a sequence
        added_axis = by_row.meta["val"].dim() > node.meta["val"].dim()
        inserts_rows = user.target is aten.unsqueeze.default and user.args[1] == 0
        if added_axis and inserts_rows and _has_shape(node, value.shape[1:]):
            _replace_in_users(program, user, by_row)
        elif user.target in _SPREADING and _has_shape(by_row, value.shape):
            user.replace_all_uses_with(by_row)
        else:
            _replace_operand(program, user, node, by_row)


def _look_up(graph: Graph, ids: fx.Node, numbers: fx.Node, by_row: fx.Node, error: Unavailable) -> None:
    """Replace values that a model computes only from its tokens' numbers by table lookups by row.

    Raises:
        Unavailable: ``error``, if a value is not (1 or batch, ..., length, features, ...).
    """
    program, count = graph.exported, graph.longest or DEFAULT_POSITIONS
    rows, length = map(str, ids.meta["val"].shape)
    for node in graph.find(aten.type_as.default):  # type_as reads only the dtype of its second operand
        graph.replace_node(node, insert_call(program, node, aten.to.dtype, node.args[0], node.meta["val"].dtype))
    sites = graph.find(*SITE_CALLS)  # adapters change the outputs of sites
    varying = find_dependents(graph.fx.nodes, [*find_user_inputs(program).values(), *sites])
    for node in list(graph.fx.nodes):
        value = node.meta.get("val")
        read = isinstance(value, torch.Tensor) and node not in varying and not varying.isdisjoint(node.users)
        if not read or numbers not in find_origins(node):
            continue
        shape = [str(size) for size in value.shape]
        axis = shape.index(length) if shape.count(length) == 1 else 0
        if not axis or not {"1", rows}.issuperset(shape[:axis]):
            raise error
        table = evaluate(node, find_stored_tensors(program), {rows: 1, length: count})
        constant = add_constant(program, table.reshape(count, *table.shape[axis + 1 :]))
        reader = node.next
        found = insert_call(program, reader, aten.index.Tensor, constant, [by_row])
        for _ in shape[1:axis]:
            found = insert_call(program, reader, aten.unsqueeze.default, found, 1)
        node.replace_all_uses_with(found)
        graph.longest = count
    used = graph.reaching_outputs()
    for node in [node for node in reversed(graph.fx.nodes) if node.op == "call_function" and node not in used]:
        graph.fx.erase_node(node)  # otherwise a write into an unused value would remain


def _has_shape(node: fx.Node, shape: Sequence[int | torch.SymInt]) -> bool:
    """Return whether a node's value has this shape; varying sizes are compared by torch's text."""
    return [str(size) for size in shape] == [str(size) for size in node.meta["val"].shape]


def _replace_operand(program: ExportedProgram, user: fx.Node, node: fx.Node, by_row: fx.Node) -> None:
    """Compute a node by row; its readers too, unless the node already had rows."""
    operands: Any = fx.map_arg(user.args, lambda operand: by_row if operand is node else operand)
    try:
        if user.target is aten.gather.default and operands[0].meta["val"].shape[0] == 1 and operands[1] == 1:
            table = insert_call(program, user, aten.select.int, operands[0], 0, 0)
            new = insert_call(program, user, aten.index.Tensor, table, [by_row])
        else:
            new = insert_call(program, user, user.target, *operands, **user.kwargs)
    except Exception as error:
        raise _unavailable(user) from error
    old_shape, new_shape = user.meta["val"].shape, new.meta["val"].shape
    if _has_shape(new, old_shape):
        user.replace_all_uses_with(new)
        return
    inner = old_shape[1:] if len(old_shape) == len(new_shape) and old_shape[0] == 1 else old_shape
    if [str(size) for size in inner] != [str(size) for size in new_shape[1:]]:
        raise _unavailable(user)
    _replace_in_users(program, user, new)


def _unavailable(user: fx.Node) -> Unavailable:
    path = find_module_path(user)
    where = f"'{path}'" if path else "the model"
    return Unavailable(f"{where} counts positions in a way that cannot differ from row to row", next_step=WITHOUT_CACHE)
