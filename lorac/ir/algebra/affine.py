"""Affine branches: a formula over (x, y) is rewritten as a formula over (W, b).

A branch computes y' from a site's input x and output y = x·Wᵀ + b. If every op is affine *for all parameters*, each
value is ``P·x + Q·y + k`` (per token, as columns), and the branch equals the weight formula::

    W' = P + Q·W        b' = Q·b + k

Ops decide whether a branch is affine, not values: a bottleneck with zero weights is not affine.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from lorac.argument_types import Operands
from lorac.ir.algebra.structure import Op, call_op, shape_of

aten = torch.ops.aten
Matrix = fx.Node | Literal["I"] | None
"""A matrix: a node, the identity, or None for zero."""


@dataclass(frozen=True)
class Affine:
    """P·x + Q·y + k, with k (n,) or None for zero."""

    p: Matrix = None
    q: Matrix = None
    k: fx.Node | None = None


Operand = Affine | fx.Node | float | None
"""An argument of an op: an affine value, a node of parameters only, or a number."""


class _AffineBuilder:
    """Builder of the nodes of the weight formula.

    Attributes:
        values: a node of the branch -> its value: affine in (x, y), or a node of parameters only.
    """

    def __init__(self, graph: fx.Graph, width_in: int, width_out: int, like: fx.Node) -> None:
        self.graph, self.like = graph, like
        self.widths = {"x": width_in, "y": width_out}
        self.values: dict[fx.Node, Any] = {}

    def operands(self, node: fx.Node) -> Operands:
        """Return the values of a node's positional operands."""
        operands: Operands = fx.map_arg(node.args, self.values.__getitem__)
        return operands

    def evaluate(self, node: fx.Node) -> Affine | fx.Node | None:
        """Return the value of one op; None for an op that is not affine in (x, y)."""
        if any(isinstance(self.values[operand], Affine) for operand in node.all_input_nodes):
            rule = _RULES.get(node.target)
            return None if rule is None else rule(self, node)
        assert callable(node.target)
        return call_op(
            self.graph, node.target, *self.operands(node), **fx.map_arg(node.kwargs, self.values.__getitem__)
        )

    def call(self, op: Op, *args: Operand) -> fx.Node:
        return call_op(self.graph, op, *args)

    def matrix(self, value: fx.Node | Literal["I"], source: str) -> fx.Node:
        """Return a node for a matrix; the identity becomes an ``eye`` node."""
        if isinstance(value, fx.Node):
            return value
        return call_op(self.graph, aten.eye.default, self.widths[source], dtype=self.like.meta["val"].dtype)

    def add(self, left: Matrix, right: Matrix, source: str) -> Matrix:
        if left is None or right is None:
            return left if right is None else right
        return self.call(aten.add.Tensor, self.matrix(left, source), self.matrix(right, source))

    def add_vectors(self, left: fx.Node | None, right: fx.Node | None) -> fx.Node | None:
        if left is None or right is None:
            return left if right is None else right
        return self.call(aten.add.Tensor, left, right)

    def scale(self, value: Matrix, factor: Operand, source: str) -> Matrix:
        return None if value is None else self.call(aten.mul.Tensor, self.matrix(value, source), factor)

    def apply(self, matrix: fx.Node, value: Matrix) -> Matrix:
        if value is None:
            return None
        return self.call(aten.mm.default, matrix, value) if isinstance(value, fx.Node) else matrix


def weight_formula(branch: fx.GraphModule, weight: tuple[int, int]) -> fx.GraphModule | None:
    """Return a formula (W, b, *params) -> (W', b') equal to an affine ``branch`` (x, y, *params) -> y'; else None.

    The result is None where the branch is not affine.

    Args:
        branch: a traced branch over x (tokens, in) and y (tokens, out).
        weight: shape (out, in) of W.
    """
    out_features, in_features = weight
    x, y, *params = branch.graph.find_nodes(op="placeholder")
    graph = fx.Graph()
    w, b = graph.placeholder("W"), graph.placeholder("b")
    sample = y.meta["val"]
    w.meta["val"], b.meta["val"] = sample.new_empty(weight), sample.new_empty((out_features,))
    build = _AffineBuilder(graph, in_features, out_features, w)
    build.values |= {x: Affine(p="I"), y: Affine(q="I")}
    for parameter in params:
        copied = build.values[parameter] = graph.placeholder(str(parameter.target))
        copied.meta["val"] = parameter.meta["val"]
    *nodes, output = (node for node in branch.graph.nodes if node.op != "placeholder")
    for node in nodes:
        # A constant of the branch is unknown in the new graph.
        value = build.evaluate(node) if node.op == "call_function" else None
        if value is None:
            return None
        build.values[node] = value
    result = build.values.get(output.args[0])
    if not isinstance(result, Affine):
        return None
    from_y = None if result.q is None else w if result.q == "I" else build.apply(result.q, w)
    new_weight = build.add(result.p, from_y, "x")
    if new_weight is None:
        return None
    from_b = None if result.q is None else b if result.q == "I" else build.call(aten.mv.default, result.q, b)
    new_bias = build.add_vectors(from_b, result.k)
    if new_bias is None:
        new_bias = build.call(aten.zeros_like.default, b)
    graph.output((build.matrix(new_weight, "x"), new_bias))
    return fx.GraphModule(torch.nn.Module(), graph)


def _apply_linear(build: _AffineBuilder, node: fx.Node) -> Affine | None:
    """M·(P·x + Q·y + k) + β; where the op multiplies rows by M, columns are multiplied by Mᵀ."""
    value, matrix, *rest = build.operands(node)
    bias = rest[0] if rest else None
    if not isinstance(value, Affine) or not isinstance(matrix, fx.Node) or isinstance(bias, Affine):
        return None
    if node.target != aten.linear.default:
        matrix = build.call(aten.t.default, matrix)
    k = None if value.k is None else build.call(aten.mv.default, matrix, value.k)
    return Affine(build.apply(matrix, value.p), build.apply(matrix, value.q), build.add_vectors(k, bias))


def _apply_sum(build: _AffineBuilder, node: fx.Node) -> Affine | None:
    terms = []
    for value in build.operands(node):
        if isinstance(value, fx.Node) and len(shape_of(value)) == 1:  # a parameter that is added to every token
            terms.append(Affine(k=value))
        elif isinstance(value, Affine):
            terms.append(value)
        else:
            return None
    left, right = terms
    alpha = node.kwargs.get("alpha", 1)
    if not isinstance(alpha, int | float):
        return None
    factor = -alpha if node.target == aten.sub.Tensor else alpha
    if factor != 1:
        scaled = _scale_affine(build, right, factor)
        assert scaled is not None
        right = scaled
    return Affine(build.add(left.p, right.p, "x"), build.add(left.q, right.q, "y"), build.add_vectors(left.k, right.k))


def _apply_product(build: _AffineBuilder, node: fx.Node) -> Affine | None:
    left, right = build.operands(node)
    return _scale_affine(build, left, right) if isinstance(left, Affine) else _scale_affine(build, right, left)


def _scale_affine(build: _AffineBuilder, value: Affine, factor: Operand) -> Affine | None:
    """Multiply an affine value by a number, a vector over the features, or a one-element tensor."""
    if isinstance(factor, Affine) or len(shape_of(factor)) > 1:
        return None
    column = build.call(aten.unsqueeze.default, factor, 1) if len(shape_of(factor)) == 1 else factor
    k = None if value.k is None else build.call(aten.mul.Tensor, value.k, factor)
    return Affine(build.scale(value.p, column, "x"), build.scale(value.q, column, "y"), k)


_RULES: dict[object, Callable[[_AffineBuilder, fx.Node], Affine | None]] = {
    aten.linear.default: _apply_linear,
    aten.matmul.default: _apply_linear,
    aten.mm.default: _apply_linear,
    aten.add.Tensor: _apply_sum,
    aten.sub.Tensor: _apply_sum,
    aten.mul.Tensor: _apply_product,
    aten.clone.default: lambda build, node: build.operands(node)[0],
    aten.contiguous.default: lambda build, node: build.operands(node)[0],
}
"""Op -> the function that computes its value from operands of which at least one is affine."""
