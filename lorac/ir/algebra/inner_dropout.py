"""Dropout between the factors of a formula.

A normal form drops the value between two factors: of ``U·(D·x + c) + e`` it keeps ``U·D`` and ``U·c + e``. Dropout of
``D·x + c`` also drops the bias c, and, where the formula reads the site's output y, the bias in y. So in training the
formula's own graph runs, with dropout on results of a product that are operands of the next product.
"""

import enum

import torch
import torch.nn.functional as F
from torch import Tensor, fx

aten = torch.ops.aten
_PRODUCTS = {aten.linear.default, aten.matmul.default, aten.mm.default}
DROPOUT_RATE = "rate"
"""The name of the last input of a graph from ``insert_inner_dropout``."""


class _ProductStage(enum.IntEnum):
    """The number of products between the tokens and a value."""

    TOKENS = 1
    """No product: a value computed from x or y."""
    BETWEEN = 2
    """One product: a value computed from the result of a product."""
    AFTER = 3
    """Two products or more: dropout was applied to an operand of the second product."""


def insert_inner_dropout(branch: fx.GraphModule) -> fx.GraphModule | None:
    """Return the branch (x, y, *params, rate) -> y' with dropout between its factors; None if there is no such place.

    Args:
        branch: an affine branch, traced over x (tokens, in) and y (tokens, out); the result takes any number of tokens.
    """
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    inputs = [node for node in branch.graph.nodes if node.op == "placeholder"]
    copied |= {node: graph.node_copy(node) for node in inputs}
    rate = graph.placeholder(DROPOUT_RATE)
    stages = dict.fromkeys(inputs[:2], _ProductStage.TOKENS)
    for node in branch.graph.nodes:
        if node in copied:
            continue
        product, known = node.target in _PRODUCTS, dict(copied)
        inner = (operand for operand in node.all_input_nodes if stages.get(operand) is _ProductStage.BETWEEN)
        if product and (operand := next(inner, None)) is not None:
            known[operand] = graph.call_function(F.dropout, (copied[operand], rate))
        copied[node] = graph.node_copy(node, known.__getitem__)
        # A value that depends only on parameters has no stage.
        if found := [stages[operand] for operand in node.all_input_nodes if operand in stages]:
            stages[node] = _ProductStage(min(max(found) + product, _ProductStage.AFTER))
    return fx.GraphModule(branch, graph) if any(node.target is F.dropout for node in graph.nodes) else None


def run_with_dropout(dropped: fx.GraphModule, x: Tensor, y: Tensor, params: tuple[Tensor, ...], rate: float) -> Tensor:
    """Run a graph from ``insert_inner_dropout`` on x (…, in) and y (…, out); return y' (…, out)."""
    rows, tokens = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    output: Tensor = dropped(rows, tokens, *params, rate)
    return output.view(y.shape)
