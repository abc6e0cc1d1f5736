"""legalize: replace ops that torch's ONNX exporter would decompose by ops for which it has translations.

To decompose an op, the exporter traces the whole graph again. Without such ops a compile takes half the time.
"""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import Target

from lorac.argument_types import Operands
from lorac.backends.onnx.export.translations import ADAPTIVE_MEANS
from lorac.ir.graph import ops
from lorac.ir.graph.edit import insert_call
from lorac.ir.graph.graph import Graph, Level
from lorac.ir.graph.nodes import copy_provenance, find_source_line, get_example
from lorac.ir.graph.passes import Pass, PassResult

aten = torch.ops.aten
_MATRIX = 2


@dataclass(frozen=True)
class Legalize(Pass):
    """expanded -> target: replace products with a matrix by lorac's own op, and aliases of ops by the ops themselves.

    ONNX has no op for the model's checks of values: each becomes an output, which the program's caller inspects. Checks
    of sizes that depend on values are dropped, with a note.
    """

    name: ClassVar[str] = "legalize"
    reads: ClassVar[Level] = Level.EXPANDED
    leaves: ClassVar[Level] = Level.TARGET

    def apply(self, graph: Graph) -> PassResult:
        checks = list(graph.find(*_CHECKS))
        if checks:
            _output_checks(graph, checks)
        changed = [node for node in list(graph.fx.nodes) if node.op == "call_function" and _legalize_node(graph, node)]
        return PassResult(changed=bool(checks or changed))


def _output_checks(graph: Graph, checks: Sequence[fx.Node]) -> None:
    """Turn checks into outputs of the graph, one for each line of the model with checks."""
    lines: dict[str, dict[fx.Node, None]] = {}
    for node in checks:
        condition = _checked_tensor(node)
        if condition is not None:
            lines.setdefault(find_source_line(node) or "", {})[condition] = None
    first = graph.fx.output_node()
    found = [
        [insert_call(graph.exported, first, aten.all.default, c) for c in conditions] for conditions in lines.values()
    ]
    both = functools.partial(insert_call, graph.exported, first, aten.logical_and.default)
    names = {f"check.{i}": functools.reduce(both, whole) for i, whole in enumerate(found)}
    graph.add_outputs(names)
    graph.interface = replace(
        graph.interface, checks={**graph.interface.checks, **dict(zip(names, lines, strict=True))}
    )
    # A check that a boolean, read as a number, is 0 or 1 is always true.
    left_out = [node for node in checks if _checked_tensor(node) is None and _truth_read_as_number(node) is None]
    for node in checks:
        graph.fx.erase_node(node)
    graph.fx.eliminate_dead_code()
    if left_out:
        graph.add_notes(_UNCHECKED_NOTE)


def _checked_tensor(check: fx.Node) -> fx.Node | None:
    """Return the boolean tensor that a check asserts; None if it asserts a relation of numbers."""
    node = check.args[0]
    if check.target in _TENSOR_CHECKS and isinstance(node, fx.Node):
        return node
    read = _truth_read_as_number(check)
    if read is None or node.target is not operator.eq:  # type: ignore[union-attr]  # then it is a node
        return None
    return read.args[0] if read.target is aten._is_all_true.default else read  # type: ignore[return-value]  # a tensor


def _truth_read_as_number(check: fx.Node) -> fx.Node | None:
    """Return the boolean that a check reads as a number; None for other checks."""
    node: object = check.args[0]
    for targets in (
        (operator.eq, operator.ge, operator.le),
        (torch.sym_ite,),
        (aten.item.default, aten._local_scalar_dense.default),
    ):
        if not isinstance(node, fx.Node) or node.target not in targets:
            return None
        node = node.args[0]
    return node if isinstance(node, fx.Node) else None


def _legalize_node(graph: Graph, node: fx.Node) -> bool:
    """Replace an op that needs replacement; return whether it was replaced."""
    rewrite = _REWRITES.get(node.target)
    if rewrite is not None:
        return rewrite(graph, node)
    if node.target in _VIEWS:
        old, new = get_example(node.args[0]).shape, get_example(node).shape
        same = len(old) == len(new) and all(statically_known_true(a == b) for a, b in zip(old, new, strict=True))
        if not same or any(user.op == "output" for user in node.users):  # an output keeps its name
            return False
        node.replace_all_uses_with(node.all_input_nodes[0])
        graph.fx.erase_node(node)
    elif node.target in _PRODUCTS:
        x, matrix = node.args[:2]
        if get_example(matrix).dim() != _MATRIX or get_example(x).dim() < _MATRIX:
            return False
        node.target, node.args = _PRODUCTS[node.target](*node.args)
    elif node.target is aten.split.Tensor:
        x, size, axis = (*node.args, 0)[:3]
        parts = [part.shape[axis] for part in get_example(node)]
        if not all(statically_known_true(part == parts[0]) for part in parts):
            return False
        # ONNX cannot derive the number of equal parts from an input's size.
        node.target, node.args = ops.SPLIT, (x, [size] * len(parts), axis)
    elif node.target in ADAPTIVE_MEANS and {*node.args[1]} == {1}:  # type: ignore[misc]  # sizes
        axes = list(range(-1, -len(node.args[1]) - 1, -1))  # type: ignore[arg-type]  # sizes
        node.target, node.args = aten.mean.dim, (node.args[0], axes, True)
    elif node.target is aten._assert_tensor_metadata.default:
        graph.fx.erase_node(node)
    elif _writes_private_tensor(node):
        op = node.target
        assert isinstance(op, OpOverload)
        node.target = getattr(getattr(aten, op._schema.name.partition("::")[2].removesuffix("_")), op._overloadname)
    elif node.target in _REVERSED:
        # Write ``other - alpha·x`` as ``other + (-alpha)·x``: dtypes are promoted only if the tensor comes first.
        x, other, alpha = (*node.args, 1)[:3]
        assert isinstance(x, fx.Node)
        factor = -node.kwargs.get("alpha", alpha)  # type: ignore[operator]  # a number
        negated = insert_call(graph.exported, node, aten.mul.Tensor, x, factor)
        node.target, node.args, node.kwargs = aten.add.Tensor, (negated, other), {}
    elif node.target in _ALIASES:
        node.target = _ALIASES[node.target]
    else:
        return False
    return True


def _legalize_cast(graph: Graph, node: fx.Node) -> bool:
    """Replace a cast by a copy to its dtype; drop it if it changes nothing and is not an output."""
    x, dtype = node.args[0], node.meta["val"].dtype
    assert isinstance(x, fx.Node)
    if x.meta["val"].dtype == dtype and all(user.op != "output" for user in node.users):
        node.replace_all_uses_with(x)
        graph.fx.erase_node(node)
    else:
        node.target, node.args, node.kwargs = aten._to_copy.default, (x,), {"dtype": dtype}
    return True


def _legalize_squeeze(graph: Graph, node: fx.Node) -> bool:
    """Squeeze each axis of size 1 separately, since ONNX has no squeeze that keeps axes of other sizes."""
    x, dims = node.args
    sizes = get_example(x).shape
    numbers: Operands = tuple(dims) if isinstance(dims, list | tuple) else (dims,)
    axes = [axis % len(sizes) for axis in numbers]
    alone = sorted((axis for axis in axes if statically_known_true(sizes[axis] == 1)), reverse=True)
    if node.target is aten.squeeze.dim and alone:
        return False
    with graph.fx.inserting_before(node):
        for axis in alone:  # from the last axis, so that the numbers of the others stay valid
            squeezed = graph.fx.call_function(aten.squeeze.dim, (x, axis))
            squeezed.meta["val"] = get_example(x).squeeze(axis)
            copy_provenance(squeezed, node)
            x = squeezed
    node.target, node.args = aten.clone.default, (x,)
    if all(user.op != "output" for user in node.users):  # an output keeps its name
        node.replace_all_uses_with(x)  # type: ignore[arg-type]  # a node
        graph.fx.erase_node(node)
    return True


def _legalize_unsqueeze(graph: Graph, node: fx.Node) -> bool:
    """Unsqueeze complex numbers as real ones with a last axis for the parts; ONNX has no op for complex ones."""
    x, axis = node.args
    is_complex = get_example(x).is_complex()
    if is_complex:
        assert isinstance(axis, int)
        parts = insert_call(graph.exported, node, aten.view_as_real.default, x)
        place = axis % get_example(node).dim()
        unsqueezed = insert_call(graph.exported, node, aten.unsqueeze.default, parts, place)
        node.target, node.args = aten.view_as_complex.default, (unsqueezed,)
    return is_complex


def _writes_private_tensor(node: fx.Node) -> bool:
    """Return whether an op writes in place to a new tensor that nothing else reads, so it may return another tensor."""
    if not _returns_tensor(node, writes=True) or not node.target._schema.name.startswith("aten::"):  # type: ignore[union-attr]  # an op
        return False
    written = node.args[0]
    if not isinstance(written, fx.Node) or list(written.users) != [node] or not _returns_tensor(written, writes=None):
        return False
    # An op that decomposes may return its operand without declaring it, as dropout does outside of training.
    new = written.target in _PRODUCTS or not written.target._can_decompose()  # type: ignore[union-attr]  # an op
    dtype = written.meta["val"].dtype  # operands of other dtypes would be promoted
    return new and all(operand.meta["val"].dtype == dtype for operand in node.all_input_nodes)


def _returns_tensor(node: fx.Node, *, writes: bool | None) -> bool:
    """Return whether an op returns a single tensor of the given kind.

    Args:
        writes: True: the operand that the op writes to; None: a new tensor.
    """
    schema = getattr(node.target, "_schema", None)
    if schema is None or len(schema.returns) != 1:
        return False
    alias = schema.returns[0].alias_info
    return (alias and alias.is_write) is writes


_PRODUCTS: dict[Target, Callable[..., tuple[Target, Operands]]] = {
    aten.linear.default: lambda x, weight, bias=None: (ops.LINEAR, (x, weight, bias, "")),
    aten.matmul.default: lambda x, matrix: (ops.MATMUL, (x, matrix)),
}
_TENSOR_CHECKS = (aten._assert_async.default, aten._assert_async.msg)
_CHECKS = (
    *_TENSOR_CHECKS,
    aten._assert_scalar.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
)
"""Ops that only raise."""
_UNCHECKED_NOTE = (
    "the program leaves out the model's own checks of input values: it answers where the model would raise"
)
_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
_REWRITES: Mapping[object, Callable[[Graph, fx.Node], bool]] = {
    **dict.fromkeys((aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other), _legalize_cast),
    **dict.fromkeys((aten.squeeze.dim, aten.squeeze.dims), _legalize_squeeze),
    aten.unsqueeze.default: _legalize_unsqueeze,
}
"""Op -> its rewrite, which returns whether it did anything."""
_REVERSED = {aten.rsub.Scalar, aten.rsub.Tensor}
_ALIASES: dict[Target, Target] = {
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.item.default: aten._local_scalar_dense.default,
    aten.max.other: aten.maximum.default,
    aten.min.other: aten.minimum.default,
}
"""Op without a translation -> the op of the same meaning that has one."""
