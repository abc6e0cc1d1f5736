"""Affine branches: a formula over (x, y), rewritten as a formula over (W, b).

A branch computes y' from a site's input x and output y = x·Wᵀ + b. If every op is affine *for all parameters*, each
value is ``P·x + Q·y + k`` (per token, as columns), and the branch equals the weight formula::

    W' = P + Q·W        b' = Q·b + k

The ops decide whether a branch is affine, not numbers: a zero-initialised bottleneck is not affine.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from lorac.argument_types import Operands
from lorac.ir.algebra.structure import Op, call_op, shape_of

aten = torch.ops.aten
Matrix = fx.Node | Literal["I"] | None
"""A node, the identity, or zero."""


@dataclass(frozen=True)
class Affine:
    """P·x + Q·y + k, with k (n,) or None for zero."""

    p: Matrix = None
    q: Matrix = None
    k: fx.Node | None = None


Operand = Affine | fx.Node | float | None
"""An argument of an op: an affine value, a node of parameters only, or a number."""


class _AffineBuilder:
    """Builds the nodes of the weight formula."""

    def __init__(self, graph: fx.Graph, width_in: int, width_out: int, like: fx.Node) -> None:
        self.graph, self.like = graph, like
        self.widths = {"x": width_in, "y": width_out}

    def call(self, op: Op, *args: Operand) -> fx.Node:
        return call_op(self.graph, op, *args)

    def matrix(self, value: fx.Node | Literal["I"], source: str) -> fx.Node:
        """Return a node for a matrix; the identity is written out."""
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
    """Return the formula (W, b, *params) -> (W', b') equal to ``branch`` (x, y, *params) -> y', or None.

    The result is None for a branch that is not affine.

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
    environment: dict[fx.Node, Affine | fx.Node] = {x: Affine(p="I"), y: Affine(q="I")}
    for parameter in params:
        copied = environment[parameter] = graph.placeholder(str(parameter.target))
        copied.meta["val"] = parameter.meta["val"]
    build = _AffineBuilder(graph, in_features, out_features, w)
    for node in branch.graph.nodes:
        if node.op == "output":
            result = node.args[0]
            return _emit_output(build, environment[result] if isinstance(result, fx.Node) else None, w, b)
        if node.op == "placeholder":
            continue
        if node.op != "call_function":  # a constant of the formula, which exists in its own graph only
            return None
        value = _evaluate(build, node, environment)
        if value is None:
            return None
        environment[node] = value
    return None


def _emit_output(build: _AffineBuilder, result: Operand, w: fx.Node, b: fx.Node) -> fx.GraphModule | None:
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
    build.graph.output((build.matrix(new_weight, "x"), new_bias))
    return fx.GraphModule(torch.nn.Module(), build.graph)


def _evaluate(build: _AffineBuilder, node: fx.Node, environment: Mapping[fx.Node, Any]) -> Affine | fx.Node | None:
    """Return the value of one op: affine in (x, y), a node of parameters only, or None if the op is not affine."""
    args: Operands = fx.map_arg(node.args, lambda n: environment[n])
    if not any(isinstance(environment[operand], Affine) for operand in node.all_input_nodes):
        kwargs = fx.map_arg(node.kwargs, lambda n: environment[n])
        assert callable(node.target)
        return call_op(build.graph, node.target, *args, **kwargs)
    rule = _RULES.get(node.target)
    return None if rule is None else rule(build, args, node.kwargs)


def _apply_linear(build: _AffineBuilder, args: Sequence[Operand], kwargs: Mapping[str, object]) -> Affine | None:
    """M·(P·x + Q·y + k) + β."""
    value, matrix, *rest = args
    if not isinstance(value, Affine) or not isinstance(matrix, fx.Node):
        return None
    bias = rest[0] if rest else None
    if bias is not None and not isinstance(bias, fx.Node):
        return None
    k = None if value.k is None else build.call(aten.mv.default, matrix, value.k)
    return Affine(build.apply(matrix, value.p), build.apply(matrix, value.q), build.add_vectors(k, bias))


def _apply_matmul(build: _AffineBuilder, args: Sequence[Operand], kwargs: Mapping[str, object]) -> Affine | None:
    """Rows times M is Mᵀ applied to columns."""
    value, matrix = args
    if not isinstance(value, Affine) or not isinstance(matrix, fx.Node):
        return None
    return _apply_linear(build, (value, build.call(aten.t.default, matrix)), kwargs)


def _apply_sum(
    build: _AffineBuilder, args: Sequence[Operand], kwargs: Mapping[str, object], sign: int = 1
) -> Affine | None:
    left, right = (value if isinstance(value, Affine) else _affine_of_vector(value) for value in args)
    alpha = kwargs.get("alpha", 1)
    if left is None or right is None or not isinstance(alpha, int | float):
        return None
    if sign * alpha != 1:
        scaled = _scale_affine(build, right, sign * alpha)
        assert scaled is not None
        right = scaled
    return Affine(build.add(left.p, right.p, "x"), build.add(left.q, right.q, "y"), build.add_vectors(left.k, right.k))


def _affine_of_vector(value: Operand) -> Affine | None:
    """Return the affine value of a parameter that is added to every token."""
    return Affine(k=value) if isinstance(value, fx.Node) and len(shape_of(value)) == 1 else None


def _apply_product(build: _AffineBuilder, args: Sequence[Operand], kwargs: Mapping[str, object]) -> Affine | None:
    value, factor = args if isinstance(args[0], Affine) else args[::-1]
    return _scale_affine(build, value, factor) if isinstance(value, Affine) else None


def _scale_affine(build: _AffineBuilder, value: Affine, factor: Operand) -> Affine | None:
    """Multiply an affine value by a number, a vector over the features, or a one-element tensor."""
    if isinstance(factor, Affine) or len(shape_of(factor)) > 1:
        return None
    column = build.call(aten.unsqueeze.default, factor, 1) if len(shape_of(factor)) == 1 else factor
    k = None if value.k is None else build.call(aten.mul.Tensor, value.k, factor)
    return Affine(build.scale(value.p, column, "x"), build.scale(value.q, column, "y"), k)


def _pass_through(build: _AffineBuilder, args: Sequence[Operand], kwargs: Mapping[str, object]) -> Affine | None:
    return args[0] if isinstance(args[0], Affine) else None


_RULES: dict[object, Callable[[_AffineBuilder, Sequence[Operand], Mapping[str, object]], Affine | None]] = {
    aten.linear.default: _apply_linear,
    aten.matmul.default: _apply_matmul,
    aten.mm.default: _apply_matmul,
    aten.add.Tensor: _apply_sum,
    aten.sub.Tensor: functools.partial(_apply_sum, sign=-1),
    aten.mul.Tensor: _apply_product,
    aten.clone.default: _pass_through,
    aten.contiguous.default: _pass_through,
}
