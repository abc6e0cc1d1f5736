"""Convolutions and recurrences over a cache: causal convolutions and recurrences take their state as an input.

A convolution's state is the earlier tokens that it still reads; a recurrence's state is its matrix. Rows have different
numbers of new tokens, padded on the right, and padding changes no state.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lorac.argument_types import Operands
from lorac.ir.graph.edit import inline
from lorac.ir.graph.graph import Graph
from lorac.ir.graph.nodes import get_example
from lorac.ir.graph.ops import RECURRENCE, STATE_OPERAND

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class TokenMixer:
    """A node that mixes tokens, and its computation from a state.

    Attributes:
        results: the nodes of its outputs, which have only the new tokens.
        shape: the state's shape, without the axis of rows.
        operands: nodes of the tensors that it reads.
        compute: function (state, number of new tokens of each row, *operands) -> the output, and the state after the
            new tokens.
    """

    results: list[fx.Node]
    shape: tuple[int, ...]
    operands: list[fx.Node]
    compute: Callable[..., tuple[Tensor, Tensor]]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the state."""
        return get_example(self.operands[0]).dtype

    def replace(self, graph: Graph, state: fx.Node, new: fx.Node) -> fx.Node:
        """Replace the node by its computation from a state; return the state after the new tokens."""
        before = self.results[0]
        outputs = inline(graph.exported, before, self.compute, [state, new, *self.operands])[1]
        for result in self.results:
            graph.replace_node(result, outputs[0])
        return outputs[1]


def iter_token_mixers(graph: Graph, ids: fx.Node) -> Iterator[TokenMixer]:
    """Yield the convolutions and recurrences over a graph's tokens that have no state yet, in node order."""
    length = str(get_example(ids).shape[1])
    for node in graph.fx.nodes:
        if node.target is RECURRENCE and node.args[STATE_OPERAND] is None:
            results = [user for user in node.users if user.args[1] == 0]
            k, v = (get_example(operand) for operand in node.args[1:3])
            shape = tuple(int(size) for size in (*k.shape[2:], v.shape[3]))
            yield TokenMixer(results, shape, list(node.all_input_nodes), _continue_recurrence(node))
        elif node.target is aten.conv1d.default and (results := _list_causal_results(node, length)):
            x, weight = (get_example(operand) for operand in node.args[:2])
            shape = (int(x.shape[1]), int(weight.shape[2]) - 1)
            yield TokenMixer(results, shape, list(node.all_input_nodes), _continue_convolution(node))


def _list_causal_results(node: fx.Node, length: str) -> list[fx.Node]:
    """Return the nodes that slice off a convolution's right padding, if the convolution reads only earlier tokens."""
    operands: Operands = node.args
    stride, padding, dilation = [*operands, *_CONV_DEFAULTS[len(operands) - 3 :]][3:6]
    if (list(stride), list(padding), list(dilation)) != ([1], [get_example(operands[1]).shape[2] - 1], [1]):
        return []
    whole = [user for user in node.users if user.target is aten.slice.Tensor and user.args[1:3] in {(2, None), (2, 0)}]
    cut = all(str(get_example(value).shape[2]) == length for value in (operands[0], *whole))
    return whole if cut and len(whole) == len(node.users) else []


_CONV_DEFAULTS = ([1], [0], [1])
"""Default stride, padding and dilation."""


def _continue_convolution(node: fx.Node) -> Callable[..., tuple[Tensor, Tensor]]:
    operands: Operands = node.args
    groups = [*operands, 1][6] if len(operands) > 5 else 1

    def compute(state: Tensor, new: Tensor, x: Tensor, weight: Tensor, *bias: Tensor) -> tuple[Tensor, Tensor]:
        padded = torch.cat([state, x], 2)
        y = aten.conv1d.default(padded, weight, *(bias or (None,)), [1], [0], [1], groups)
        last = new.to(torch.int64)[:, None, None] + torch.arange(state.shape[2])
        return y, torch.gather(padded, 2, last.expand(-1, state.shape[1], -1))

    return compute


def _continue_recurrence(node: fx.Node) -> Callable[..., tuple[Tensor, Tensor]]:
    def compute(state: Tensor, new: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(node.all_input_nodes, values, strict=True))
        operands: Any = fx.map_arg(node.args, lambda operand: given[operand])
        is_token = torch.arange(values[0].shape[1]) < new[:, None]

        def blank(x: Tensor | None) -> Tensor | None:
            return None if x is None else torch.where(is_token.view(*is_token.shape, *[1] * (x.dim() - 2)), x, 0.0)

        q, k, v, decay, rate, beta = operands[:STATE_OPERAND]
        y, behind = RECURRENCE(q, *map(blank, (k, v, decay)), rate, blank(beta), state)
        return y, behind

    return compute
