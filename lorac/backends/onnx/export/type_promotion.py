"""Explicit casts for torch's implicit ones, since ONNX does not promote dtypes.

The rules are those of torch's exporter. Its own pass runs the whole program again on fake tensors to learn the dtypes
of operands. This module reads them from the program, and recomputes only values that a cast changes.
"""

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import Argument

from lorac.backends.onnx.export.torchlib import (
    TypePromotionTable,
    find_compatible_op_overload,
    get_type_promotion_rule,
)

_CAST = torch.ops.prims.convert_element_type.default
_TO_TENSOR = torch.ops.aten.scalar_tensor.default
_DTYPES: Mapping[type, torch.dtype] = {
    bool: torch.bool,
    int: torch.int64,
    float: torch.float32,
    complex: torch.complex64,
    torch.SymBool: torch.bool,
    torch.SymInt: torch.int64,
    torch.SymFloat: torch.float32,
}
"""Type of a number -> the dtype it has as an operand."""


def insert_casts(graph: fx.Graph, mode: FakeTensorMode) -> None:
    """Insert the casts of operands and results that torch makes implicitly, in place.

    Args:
        graph: a graph with an example of every value in its nodes' metadata.
        mode: the fake mode of these examples.
    """
    rules = [(node, get_type_promotion_rule(node, _promotion_table())) for node in graph.nodes]
    with mode, enable_python_dispatcher():
        for node, rule in [(node, rule) for node, rule in rules if rule is not None]:
            # A rule stores state while it is applied, so each thread applies a copy.
            promotion = copy.copy(rule).preview_type_promotion(_examples(node.args), _examples(node.kwargs))
            args = tuple(_cast(node, arg, promotion.args_dtypes.get(i)) for i, arg in enumerate(node.args))
            kwargs = {name: _cast(node, arg, promotion.kwargs_dtypes.get(name)) for name, arg in node.kwargs.items()}
            if args == node.args and kwargs == node.kwargs:
                continue
            assert isinstance(node.target, OpOverload)
            node.args, node.kwargs = args, kwargs
            packet = node.target.overloadpacket
            node.target = find_compatible_op_overload(packet, _examples(args), _examples(kwargs))
            if _compute(node).dtype == promotion.out_dtype:
                continue
            with node.graph.inserting_after(node):
                restored = node.graph.call_function(_CAST, (node,), {"dtype": promotion.out_dtype})
            _compute(restored, node)
            node.replace_all_uses_with(restored, delete_user_cb=lambda user, own=restored: user is not own)


_promotion_table = functools.cache(TypePromotionTable)


def _cast(node: fx.Node, operand: Argument, dtype: torch.dtype | None) -> Argument:
    """Return an operand in a dtype: unchanged, or cast by a new node before the node that reads it."""
    if dtype is None:
        return operand
    if isinstance(operand, tuple | list):
        return type(operand)(_cast(node, element, dtype) for element in operand)
    value = operand.meta.get("val") if isinstance(operand, fx.Node) else operand
    is_tensor = isinstance(value, torch.Tensor)
    if (value.dtype if isinstance(value, torch.Tensor) else _DTYPES[type(value)]) == dtype:
        return operand
    with node.graph.inserting_before(node):
        made = node.graph.call_function(_CAST if is_tensor else _TO_TENSOR, (operand,), {"dtype": dtype})
    _compute(made, node)
    return made


def _compute(node: fx.Node, origin: fx.Node | None = None) -> torch.Tensor:
    """Compute a node's example from its operands' examples, store and return it.

    Args:
        node: a new or changed node.
        origin: the node whose provenance a new node gets.
    """
    if origin is not None:
        node.meta.update({key: value for key, value in origin.meta.items() if key != "val"})
    assert callable(node.target)
    value: torch.Tensor = node.target(*_examples(node.args), **_examples(node.kwargs))
    node.meta["val"] = value
    return value


def _examples(arguments: Argument) -> Any:
    return fx.map_arg(arguments, lambda node: node.meta.get("val"))
