"""Branches that are affine: a formula over (x, y) rewritten as one over (W, b).

A branch computes y' from a site's input x and output y = x·Wᵀ + b. Where every op on the way is affine *whatever the
parameters are*, each value is ``P·x + Q·y + k`` (per token, as columns) and the branch is the weight formula::

    W' = P + Q·W        b' = Q·b + k

Affinity is read off the ops, never probed with numbers: a zero-initialised bottleneck is not affine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


@dataclass(frozen=True)
class Affine:
    """P·x + Q·y + k. P and Q are nodes, ``"I"`` (identity) or None (zero); k is a node (n,) or None."""

    p: Any = None
    q: Any = None
    k: Any = None


class _AffineBuilder:
    """Makes the nodes of the weight formula; ``values`` maps the branch's parameter nodes to theirs."""

    def __init__(self, graph: fx.Graph, width_in: int, width_out: int, like: fx.Node) -> None:
        self.graph, self.like = graph, like
        self.widths = {"x": width_in, "y": width_out}

    def call(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(op, args, kwargs)
        values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = op(*values[0], **values[1])
        return node

    def matrix(self, value: Any, source: str) -> Any:
        """A node for an identity that has to be written out."""
        if value != "I":
            return value
        size = self.widths[source]
        dtype = self.like.meta["val"].dtype
        return self.call(aten.eye.default, size, dtype=dtype)

    def add(self, left: Any, right: Any, source: str) -> Any:
        if left is None or right is None:
            return left if right is None else right
        return self.call(aten.add.Tensor, self.matrix(left, source), self.matrix(right, source))

    def scale(self, value: Any, factor: Any, source: str) -> Any:
        return None if value is None else self.call(aten.mul.Tensor, self.matrix(value, source), factor)

    def apply(self, matrix: fx.Node, value: Any) -> Any:
        if value is None:
            return None
        return matrix if value == "I" else self.call(aten.mm.default, matrix, value)


def weight_formula(branch: fx.GraphModule, weight: tuple[int, int]) -> fx.GraphModule | None:
    """The formula (W, b, *params) -> (W', b') equal to ``branch`` (x, y, *params) -> y'; None: it is not affine.

    Args:
        branch: a traced branch over x (tokens, in) and y (tokens, out).
        weight: shape (out, in) of W.
    """
    out_features, in_features = weight
    placeholders = [n for n in branch.graph.nodes if n.op == "placeholder"]
    x, y, *params = placeholders
    graph = fx.Graph()
    w, b = graph.placeholder("W"), graph.placeholder("b")
    sample = y.meta["val"]
    w.meta["val"], b.meta["val"] = sample.new_empty(weight), sample.new_empty((out_features,))
    environment: dict[fx.Node, Any] = {x: Affine(p="I"), y: Affine(q="I")}
    for parameter in params:
        environment[parameter] = graph.placeholder(str(parameter.target))
        environment[parameter].meta["val"] = parameter.meta["val"]
    build = _AffineBuilder(graph, in_features, out_features, w)
    for node in branch.graph.nodes:
        if node.op == "output":
            return _emit_output(build, environment[node.args[0]] if isinstance(node.args[0], fx.Node) else None, w, b)
        if node.op == "placeholder":
            continue
        if node.op != "call_function":  # a constant of the formula's own, which only its own graph holds
            return None
        value = _evaluate(build, node, environment)
        if value is None:
            return None
        environment[node] = value
    return None


def _emit_output(build: _AffineBuilder, result: Any, w: fx.Node, b: fx.Node) -> fx.GraphModule | None:
    if not isinstance(result, Affine):
        return None
    from_y = None if result.q is None else build.apply(build.matrix(result.q, "y"), w) if result.q != "I" else w
    new_weight = build.add(result.p, from_y, "x")
    new_bias = b if result.q == "I" else None if result.q is None else build.call(aten.mv.default, result.q, b)
    new_bias = result.k if new_bias is None else build.add(new_bias, result.k, "y")
    if new_weight is None:
        return None
    if new_bias is None:
        new_bias = build.call(aten.zeros_like.default, b)
    build.graph.output((build.matrix(new_weight, "x"), new_bias))
    return fx.GraphModule(torch.nn.Module(), build.graph)


def _evaluate(build: _AffineBuilder, node: fx.Node, environment: dict[fx.Node, Any]) -> Any:
    """The value of one op: affine in (x, y), a node of parameters only, or None where the op is not affine."""
    args = fx.map_arg(node.args, lambda n: environment[n])
    flat: list[Any] = []
    fx.node.map_aggregate(args, lambda a: flat.append(a) or a)  # type: ignore[func-returns-value]  # append answers None
    if not any(isinstance(a, Affine) for a in flat):
        kwargs = fx.map_arg(node.kwargs, lambda n: environment[n])
        return build.call(node.target, *args, **kwargs)  # type: ignore[arg-type]  # only calls come here
    rule = _RULES.get(node.target)
    return None if rule is None else rule(build, args, dict(node.kwargs))


def _apply_linear(build: _AffineBuilder, args: Any, kwargs: dict[str, Any]) -> Affine | None:
    """M·(P·x + Q·y + k) + β."""
    value, matrix, *rest = args
    if not isinstance(value, Affine) or isinstance(matrix, Affine):
        return None
    k = None if value.k is None else build.call(aten.mv.default, matrix, value.k)
    k = build.add(k, rest[0] if rest else None, "y")
    return Affine(build.apply(matrix, value.p), build.apply(matrix, value.q), k)


def _apply_matmul(build: _AffineBuilder, args: Any, kwargs: dict[str, Any]) -> Affine | None:
    """Rows times M is Mᵀ applied to columns."""
    value, matrix = args
    if not isinstance(value, Affine) or isinstance(matrix, Affine):
        return None
    return _apply_linear(build, (value, build.call(aten.t.default, matrix)), kwargs)


def _apply_sum(build: _AffineBuilder, args: Any, kwargs: dict[str, Any]) -> Affine | None:
    left, right = args
    alpha = kwargs.get("alpha", 1)
    return _add_affine(build, left, right, alpha)


def _apply_difference(build: _AffineBuilder, args: Any, kwargs: dict[str, Any]) -> Affine | None:
    left, right = args
    return _add_affine(build, left, right, -kwargs.get("alpha", 1))


def _add_affine(build: _AffineBuilder, left: Any, right: Any, alpha: Any) -> Affine | None:
    left, right = (v if isinstance(v, Affine) else _affine_of_vector(v) for v in (left, right))
    if left is None or right is None:
        return None
    if alpha != 1:
        right = _scale_affine(build, right, alpha)
    return Affine(
        build.add(left.p, right.p, "x"),
        build.add(left.q, right.q, "y"),
        build.add(left.k, right.k, "y"),
    )


def _affine_of_vector(value: Any) -> Affine | None:
    """A parameter added to every token."""
    if isinstance(value, fx.Node) and value.meta["val"].dim() == 1:
        return Affine(k=value)
    return None


def _apply_product(build: _AffineBuilder, args: Any, kwargs: dict[str, Any]) -> Affine | None:
    value, factor = args if isinstance(args[0], Affine) else args[::-1]
    return None if isinstance(factor, Affine) else _scale_affine(build, value, factor)


def _scale_affine(build: _AffineBuilder, value: Affine, factor: Any) -> Affine | None:
    """A number, a vector over the features, or a one-element tensor times an affine value."""
    matrix_factor = factor
    if isinstance(factor, fx.Node):
        size = factor.meta["val"]
        if size.dim() > 1:
            return None
        matrix_factor = build.call(aten.unsqueeze.default, factor, 1) if size.dim() == 1 else factor
    k = None if value.k is None else build.call(aten.mul.Tensor, value.k, factor)
    return Affine(build.scale(value.p, matrix_factor, "x"), build.scale(value.q, matrix_factor, "y"), k)


def _pass_through(build: _AffineBuilder, args: Any, kwargs: dict[str, Any]) -> Affine | None:
    return args[0] if isinstance(args[0], Affine) else None


_RULES: dict[Any, Callable[[_AffineBuilder, Any, dict[str, Any]], Affine | None]] = {
    aten.linear.default: _apply_linear,
    aten.matmul.default: _apply_matmul,
    aten.mm.default: _apply_matmul,
    aten.add.Tensor: _apply_sum,
    aten.sub.Tensor: _apply_difference,
    aten.mul.Tensor: _apply_product,
    aten.clone.default: _pass_through,
    aten.contiguous.default: _pass_through,
}
