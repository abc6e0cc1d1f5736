"""The algebra of weight formulas: which structure a traced formula has, found node by node.

A formula is traced to an aten graph over ``W`` (out, in), ``b`` (out,) and the variant's parameters. Each matrix-valued
node may get a ``Form``, a sum of recognised parts::

    c ∘ base ∘ d  +  Σ Bᵢ·Aᵢ  +  Σ sparse(rowsⱼ, colsⱼ, valuesⱼ)        base: W, the identity, or nothing

Rules buy speed only. A node without a form is still computed by its own aten op, so taking any rule away leaves every
result and makes it slower. Each rule names the identity it uses; none knows a method. Rules that fire keep the
original nodes: a ``Form`` is an annotation, new nodes are made only for the factors it speaks of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
WEIGHT, IDENTITY = "W", "I"


@dataclass(frozen=True)
class Form:
    """A matrix as a sum of recognised parts; every operand is a node of the same graph.

    Attributes:
        base: ``"W"``, ``"I"`` or None.
        c: column (n, 1) scaling the base's rows, None for 1.
        d: row (1, m) scaling the base's columns, None for 1.
        low: pairs (B (n, r), A (r, m)).
        sparse: triples (rows (k,), cols (k,), values (k,)), added up.
    """

    base: str | None = None
    c: fx.Node | None = None
    d: fx.Node | None = None
    low: tuple[tuple[fx.Node, fx.Node], ...] = ()
    sparse: tuple[tuple[fx.Node, fx.Node, fx.Node], ...] = ()


@dataclass
class Analysis:
    """The state of one analysis: the graph, the forms found so far, and a way to make new nodes.

    ``like`` gives new constants their dtype and device; it is not W, which a form should not read without need.
    """

    graph: fx.Graph
    anchor: fx.Node
    like: fx.Node
    forms: dict[fx.Node, Form] = field(default_factory=dict)
    misses: list[str] = field(default_factory=list)

    def form(self, value: object) -> Form | None:
        """The form of an operand, or None where it is opaque."""
        return self.forms.get(value) if isinstance(value, fx.Node) else None

    def emit(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A new node ``op(*args)`` before the anchor, with its value's shape known."""
        with self.graph.inserting_before(self.anchor):
            node = self.graph.call_function(op, args, kwargs)
        values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = op(*values[0], **values[1])
        return node

    def times(self, left: Any, right: Any) -> Any:
        """left ∘ right, where None stands for 1."""
        if left is None:
            return right
        return left if right is None else self.emit(aten.mul.Tensor, left, right)


Rule = Callable[[Analysis, fx.Node], Form | None]


@dataclass(frozen=True)
class NamedRule:
    """One identity: the ops it looks at and what it makes of them."""

    name: str
    ops: tuple[object, ...]
    build: Rule


def shape_of(value: Any) -> tuple[int, ...]:
    """Shape of an operand; () for numbers."""
    return tuple(value.meta["val"].shape) if isinstance(value, fx.Node) else ()


def analyse(graph: fx.Graph, weight: fx.Node | None, rules: Sequence[NamedRule]) -> Analysis:
    """Find the form of every node of ``graph``; ``weight`` is the placeholder that is W."""
    anchor = next(iter(reversed(graph.nodes)))
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    found = Analysis(graph, anchor, next(node for node in inputs if node is not weight))
    if weight is not None:
        found.forms[weight] = Form(base=WEIGHT)
    by_op: dict[object, list[NamedRule]] = {}
    for rule in rules:
        for op in rule.ops:
            by_op.setdefault(op, []).append(rule)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        for rule in by_op.get(node.target, ()):
            form = rule.build(found, node)
            if form is not None:
                found.forms[node] = form
                break
    return found


# --- the rules ---------------------------------------------------------------------------------------------------


def _passing(found: Analysis, node: fx.Node) -> Form | None:
    """copy(X) = X."""
    return found.form(node.args[0])


def _identity(found: Analysis, node: fx.Node) -> Form | None:
    """eye(n) = I."""
    rows, *rest = shape_of(node)
    return Form(base=IDENTITY) if rest == [rows] else None


def _zero(found: Analysis, node: fx.Node) -> Form | None:
    """zeros(n, m) is the empty sum."""
    return Form() if len(shape_of(node)) == 2 else None


def _factor(found: Analysis, node: fx.Node) -> Form | None:
    """B (n, r) · A (r, m) is low-rank where applying the factors costs less than the product's n·m."""
    left, right = node.args
    if found.form(left) is not None or found.form(right) is not None:
        return None
    (n, r), (_, m) = shape_of(left), shape_of(right)
    if r * (n + m) > n * m:
        found.misses.append(f"{node.name}: inner size {r} of a {n} x {m} product saves nothing")
        return None
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    return Form(low=((left, right),))


def _product(found: Analysis, node: fx.Node) -> Form | None:
    """(c∘I + Σ P·Q)·Y = c∘Y + Σ P·(Q·Y); and X·(Σ P·Q) = Σ (X·P)·Q."""
    left, right = node.args
    x, y = found.form(left), found.form(right)
    if x is None:
        return _times_low(found, left, y)
    if x.base == WEIGHT or x.sparse or x.d is not None:
        return None
    low = tuple((p, found.emit(aten.mm.default, q, right)) for p, q in x.low)
    if x.base is None:
        return Form(low=low)
    if y is None:
        return None
    scaled = y if x.c is None else _scale_rows(found, y, x.c)
    return replace(scaled, low=scaled.low + low)


def _times_low(found: Analysis, left: Any, y: Form | None) -> Form | None:
    if y is None or y.base is not None or y.sparse:
        return None
    return Form(low=tuple((found.emit(aten.mm.default, left, p), q) for p, q in y.low))


def _sum(found: Analysis, node: fx.Node) -> Form | None:
    """(X + α·Y) adds the parts; two bases add their scales."""
    left, right = node.args[:2]
    x, y = found.form(left), found.form(right)
    if x is None or y is None or shape_of(left) != shape_of(right):
        return None
    alpha = node.kwargs.get("alpha", 1)
    if node.target == aten.sub.Tensor:
        alpha = -alpha  # type: ignore[operator]
    if alpha != 1:
        y = _scale_number(found, node, y, alpha)
    return _add(found, node, x, y)


def _add(found: Analysis, node: fx.Node, x: Form, y: Form) -> Form | None:
    low, sparse = x.low + y.low, x.sparse + y.sparse
    if x.base is None or y.base is None:
        base = x if y.base is None else y
        return Form(base.base, base.c, base.d, low, sparse)
    if x.base != y.base or x.d is not None or y.d is not None:
        return None
    return Form(x.base, _sum_of_scales(found, node, x, y), None, low, sparse)


def _sum_of_scales(found: Analysis, node: fx.Node, x: Form, y: Form) -> fx.Node:
    if x.c is None and y.c is None:
        return _column(found, node, 2.0)
    if x.c is None or y.c is None:
        return found.emit(aten.add.Tensor, x.c if x.c is not None else y.c, 1.0)
    return found.emit(aten.add.Tensor, x.c, y.c)


def _addmm(found: Analysis, node: fx.Node) -> Form | None:
    """addmm(C, X, Y) = β·C + α·X·Y, with X·Y low-rank."""
    c, left, right = node.args
    form = found.form(c)
    if form is None or shape_of(c) != shape_of(node) or found.form(left) or found.form(right):
        return None
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    form = form if beta == 1 else _scale_number(found, node, form, beta)
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    return _add(found, node, form, _scale_number(found, node, Form(low=((left, right),)), alpha))


def _scale(found: Analysis, node: fx.Node) -> Form | None:
    """s·X, c∘X and X∘d scale every part."""
    left, right = node.args[:2]
    if found.form(left) is None:
        left, right = right, left
    form = found.form(left)
    if form is None or found.form(right) is not None:
        return None
    return _scale_by(found, node, left, form, right)


def _scale_by(found: Analysis, node: fx.Node, matrix: Any, form: Form, factor: Any) -> Form | None:
    """``matrix`` times a number, a column or a row; None where the factor is a matrix or broadcasts the other way."""
    if shape_of(matrix) != shape_of(node):
        return None
    rows, columns = shape_of(node)
    shape = shape_of(factor)
    if torch.Size(shape).numel() == 1:
        return _scale_number(found, node, form, found.emit(aten.view.default, factor, []) if shape else factor)
    if shape == (rows, 1):
        return _scale_rows(found, form, factor)
    if shape in {(1, columns), (columns,)}:
        return _scale_columns(found, form, factor)
    return None


def _hadamard(found: Analysis, node: fx.Node) -> Form | None:
    """(Σ P·Q)∘(Σ R·S) = Σ (P∗R)·(Q∗S), ∗ multiplying every column of one with every column of the other."""
    x, y = (found.form(operand) for operand in node.args[:2])
    if x is None or y is None or any(form.base or form.sparse for form in (x, y)):
        return None
    n, m = shape_of(node)
    if any(shape_of(operand) != (n, m) for operand in node.args[:2]):
        return None
    rank = math.prod(sum(shape_of(a)[0] for _, a in form.low) for form in (x, y))
    if rank * (n + m) > n * m:
        found.misses.append(f"{node.name}: inner size {rank} of a {n} x {m} product saves nothing")
        return None
    pairs = ((_all_products(found, p, r, 1), _all_products(found, q, s, 0)) for p, q in x.low for r, s in y.low)
    return Form(low=tuple(pairs))


def _all_products(found: Analysis, left: fx.Node, right: fx.Node, dim: int) -> fx.Node:
    """Every column (dim 1) or row (dim 0) of one matrix times every one of the other."""
    wide = found.emit(aten.unsqueeze.default, left, dim + 1), found.emit(aten.unsqueeze.default, right, dim)
    shape = list(shape_of(left))
    shape[dim] *= shape_of(right)[dim]
    return found.emit(aten.reshape.default, found.emit(aten.mul.Tensor, *wide), shape)


def _divide(found: Analysis, node: fx.Node) -> Form | None:
    """X / s = X·(1/s), for a number, a column or a row."""
    form, divisor = found.form(node.args[0]), node.args[1]
    if form is None or found.form(divisor) is not None:
        return None
    inverse = found.emit(aten.reciprocal.default, divisor) if isinstance(divisor, fx.Node) else 1.0 / divisor  # type: ignore[operator]
    return _scale_by(found, node, node.args[0], form, inverse)


def _negate(found: Analysis, node: fx.Node) -> Form | None:
    """−X = (−1)·X."""
    form = found.form(node.args[0])
    return None if form is None else _scale_number(found, node, form, -1.0)


def _scale_number(found: Analysis, node: fx.Node, form: Form, number: Any) -> Form:
    if not isinstance(number, fx.Node) and number == 1:
        return form
    c = form.c
    if form.base is not None:
        c = found.times(form.c, number) if form.c is not None else _column(found, node, number)
    low = tuple((found.emit(aten.mul.Tensor, b, number), a) for b, a in form.low)
    sparse = tuple((rows, cols, found.emit(aten.mul.Tensor, v, number)) for rows, cols, v in form.sparse)
    return replace(form, c=c, low=low, sparse=sparse)


def _column(found: Analysis, node: fx.Node, number: Any) -> fx.Node:
    """A number as the column (n, 1) that scales the rows of ``node``."""
    ones = found.emit(aten.new_ones.default, found.like, [shape_of(node)[0], 1])
    return found.emit(aten.mul.Tensor, ones, number)


def _scale_rows(found: Analysis, form: Form, column: Any) -> Form:
    low = tuple((found.emit(aten.mul.Tensor, b, column), a) for b, a in form.low)
    sparse = tuple((rows, cols, _scaled_entries(found, v, column, 0, rows)) for rows, cols, v in form.sparse)
    return replace(form, c=found.times(form.c, column) if form.base else None, low=low, sparse=sparse)


def _scale_columns(found: Analysis, form: Form, row: Any) -> Form:
    low = tuple((b, found.emit(aten.mul.Tensor, a, row)) for b, a in form.low)
    sparse = tuple((rows, cols, _scaled_entries(found, v, row, -1, cols)) for rows, cols, v in form.sparse)
    return replace(form, d=found.times(form.d, row) if form.base else None, low=low, sparse=sparse)


def _scaled_entries(found: Analysis, values: fx.Node, scale: fx.Node, dim: int, positions: fx.Node) -> fx.Node:
    flat = found.emit(aten.view.default, scale, [-1])
    return found.emit(aten.mul.Tensor, values, found.emit(aten.index_select.default, flat, 0, positions))


def _scatter(found: Analysis, node: fx.Node) -> Form | None:
    """X with values added at (rows, cols)."""
    arguments: tuple[Any, ...] = node.args
    target, indices, values, *rest = arguments
    accumulate = rest[0] if rest else node.kwargs.get("accumulate", False)
    form = found.form(target)
    if form is None or not accumulate or len(indices) != 2 or None in indices:
        return None
    rows, cols = indices
    flat = len(shape_of(rows)) == 1 and shape_of(rows) == shape_of(cols) == shape_of(values)
    if not flat or torch.bool in {rows.meta["val"].dtype, cols.meta["val"].dtype}:
        found.misses.append(f"{node.name}: its positions are no two lists as long as its values")
        return None
    return replace(form, sparse=(*form.sparse, (rows, cols, values)))


def _transpose(found: Analysis, node: fx.Node) -> Form | None:
    """(Σ B·A)ᵀ = Σ Aᵀ·Bᵀ; the base keeps its orientation, so a form with one is left alone."""
    form = found.form(node.args[0])
    if form is None or form.base == WEIGHT:
        return None
    low = tuple((found.emit(aten.t.default, a), found.emit(aten.t.default, b)) for b, a in form.low)
    sparse = tuple((cols, rows, values) for rows, cols, values in form.sparse)
    c = found.emit(aten.t.default, form.d) if form.d is not None else None
    d = found.emit(aten.t.default, form.c) if form.c is not None else None
    return Form(form.base, c, d, low, sparse)


RULES: tuple[NamedRule, ...] = (
    NamedRule("copies", (aten.clone.default, aten.alias.default, aten.contiguous.default), _passing),
    NamedRule("identity", (aten.eye.default,), _identity),
    NamedRule("zeros", (aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default), _zero),
    NamedRule("product", (aten.mm.default,), _product),
    NamedRule("factor", (aten.mm.default,), _factor),
    NamedRule("addmm", (aten.addmm.default,), _addmm),
    NamedRule("sum", (aten.add.Tensor, aten.sub.Tensor), _sum),
    NamedRule("scale", (aten.mul.Tensor,), _scale),
    NamedRule("hadamard", (aten.mul.Tensor,), _hadamard),
    NamedRule("divide", (aten.div.Tensor,), _divide),
    NamedRule("negate", (aten.neg.default,), _negate),
    NamedRule("transpose", (aten.t.default,), _transpose),
    NamedRule("scatter", (aten.index_put.default,), _scatter),
)
"""Every rule, tried in this order per node. ``lorac.ir.normal`` takes another list to prove that none is needed."""


def without(name: str) -> tuple[NamedRule, ...]:
    """The table with one rule taken away (tests remove each in turn)."""
    return tuple(rule for rule in RULES if rule.name != name)


def rule_names() -> Mapping[str, str]:
    """Rule name -> the identity it uses."""
    return {rule.name: (rule.build.__doc__ or "").strip() for rule in RULES}
