"""Dropout between the factors of a formula: the formula itself, run with dropout where its parts have their rank.

A normal form does not tell what stood between two factors: of ``U·(D·x + c) + e`` it keeps ``U·D`` and ``U·c + e``. Who
drops ``D·x + c`` drops the bias c with it, and where the part reads the site's output y, the bias in y too. So in
training the formula's own graph runs, and what a product gave is dropped where the next product takes it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import fx

aten = torch.ops.aten
Tensor = torch.Tensor
_PRODUCTS = {aten.linear.default, aten.matmul.default, aten.mm.default}
DROPOUT_RATE = "rate"
"""The last input of what ``with_dropout`` gives."""


class _ProductStage(enum.IntEnum):
    """How far a value is on the way from the tokens through the factors."""

    TOKENS = 1
    """It follows from x or y by no product yet."""
    BETWEEN = 2
    """It came out of one product."""
    BEHIND = 3
    """It was dropped, and went through the next."""


def insert_inner_dropout(branch: fx.GraphModule) -> fx.GraphModule | None:
    """The branch (x, y, *params, rate) -> y' with dropout between its factors; None where nothing lies between any.

    Args:
        branch: an affine branch, traced over x (tokens, in) and y (tokens, out); it serves any number of tokens.
    """
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    inputs = [node for node in branch.graph.nodes if node.op == "placeholder"]
    copied |= {node: graph.node_copy(node) for node in inputs}
    rate = graph.placeholder(DROPOUT_RATE)
    stages = dict.fromkeys(inputs[:2], _ProductStage.TOKENS)
    for node in branch.graph.nodes:
        if node in copied:
            continue
        operand = _find_inner_operand(node, stages)
        known = copied if operand is None else {**copied, operand: _insert_dropout(graph, copied[operand], rate)}
        copied[node] = graph.node_copy(node, lambda n, known=known: known[n])  # type: ignore[misc]  # the default binds the loop's value
        _advance(node, stages)
    found = any(node.target is F.dropout for node in graph.nodes)
    return fx.GraphModule(branch, graph) if found else None


def _find_inner_operand(node: fx.Node, stages: Mapping[fx.Node, _ProductStage]) -> fx.Node | None:
    """The operand of a product that itself came out of one."""
    if node.target not in _PRODUCTS:
        return None
    return next((operand for operand in node.all_input_nodes if stages.get(operand) is _ProductStage.BETWEEN), None)


def _advance(node: fx.Node, stages: dict[fx.Node, _ProductStage]) -> None:
    """Note how far an op's value is; one of parameters alone is on no way."""
    read = [stages[operand] for operand in node.all_input_nodes if operand in stages]
    if read:
        stages[node] = _ProductStage(min(max(read) + (node.target in _PRODUCTS), _ProductStage.BEHIND))


def _insert_dropout(graph: fx.Graph, value: fx.Node, rate: fx.Node) -> fx.Node:
    return graph.call_function(F.dropout, (value, rate))


def run_with_dropout(dropped: fx.GraphModule, x: Tensor, y: Tensor, params: tuple[Tensor, ...], rate: float) -> Tensor:
    """y' (…, out) of what ``with_dropout`` gave, from x (…, in) and y (…, out)."""
    rows, tokens = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    answer: Tensor = dropped(rows, tokens, *params, rate)
    return answer.view(y.shape)
