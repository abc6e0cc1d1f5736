"""The rules of the algebra: each states one identity, and none depends on a method."""

import math
import operator
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import fx

from lorac.argument_types import Operands
from lorac.ir.algebra.row_blocks import match_joined_blocks, match_row_block
from lorac.ir.algebra.structure import IDENTITY, AlgebraRule, Analysis, Form, RuleFunction, shape_of

aten = torch.ops.aten
_rules: list[AlgebraRule] = []


def _rule(name: str, *ops: object) -> Callable[[RuleFunction], RuleFunction]:
    """Return a decorator that adds a rule for these ops; the rules of an op are tried in this file's order."""

    def add(build: RuleFunction) -> RuleFunction:
        _rules.append(AlgebraRule(name, ops, build))
        return build

    return add


@_rule("copies", aten.clone.default, aten.alias.default, aten.contiguous.default)
def _match_copy(found: Analysis, node: fx.Node) -> Form | None:
    """copy(X) = X."""
    return found.form(node.args[0])


@_rule("identity", aten.eye.default)
def _match_identity(found: Analysis, node: fx.Node) -> Form | None:
    """eye(n) = I."""
    return Form(base=IDENTITY)


@_rule("zeros", aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)
def _match_zeros(found: Analysis, node: fx.Node) -> Form | None:
    """zeros(n, m) is the empty sum."""
    return Form() if len(shape_of(node)) == 2 else None


@_rule("blocks", aten.block_diag.default)
def _match_block_diagonal(found: Analysis, node: fx.Node) -> Form | None:
    """block_diag(M₁, M₂, …) = I·D, for square Mᵢ of one size."""
    parts: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]  # block_diag takes a list
    sizes = {shape_of(part) for part in parts}
    size = next(iter(sizes), ())
    if len(parts) < 2 or len(sizes) > 1 or len(size) != 2 or size[0] != size[1]:
        found.misses.append(f"{node.name}: its blocks are not two or more squares of one size")
        return None
    # The blocks as one tensor: the tensor that was unbound into them, if they are in order, or a new stack.
    origins = {part.args[0] for part in parts if part.target is operator.getitem}
    origin = next(iter(origins)) if len(origins) == 1 else None
    if isinstance(origin, fx.Node) and origin.target is aten.unbind.int and origin.args[1:] in {(), (0,)}:
        source = origin.args[0]
        ordered = [part.args[1] for part in parts] == list(range(shape_of(source)[0]))
        if ordered and isinstance(source, fx.Node):
            return Form(base=IDENTITY, blocks=source)
    return Form(base=IDENTITY, blocks=found.emit(aten.stack.default, parts))


@_rule("product", aten.mm.default)
def _match_product(found: Analysis, node: fx.Node) -> Form | None:
    """(c∘I + Σ P·Q)·Y = c∘Y + Σ P·(Q·Y); X·(Σ P·Q) = Σ (X·P)·Q; (c∘W + Σ P·Q)·D = c∘W·D + Σ P·(Q·D)."""
    left, right = node.args
    x, y = found.form(left), found.form(right)
    if x is None:
        if y is None or y.base is not None or y.sparse:
            return None
        return Form(low=tuple((found.emit(aten.mm.default, left, p), q) for p, q in y.low))
    if y is not None and y == Form(IDENTITY, blocks=y.blocks) and y.blocks is not None:
        blocks = y.blocks
        number, size, _ = shape_of(blocks)
        if x.sparse or (x.blocks is not None and shape_of(x.blocks) != shape_of(blocks)):
            return None
        if x.blocks is not None:
            blocks = found.emit(aten.bmm.default, x.blocks, blocks)
        if x.d is not None:
            blocks = found.emit(aten.mul.Tensor, found.emit(aten.view.default, x.d, [number, size, 1]), blocks)
        low = tuple((p, found.emit(aten.mm.default, q, right)) for p, q in x.low)
        return Form(x.base, x.c, low=low, blocks=blocks if x.base else None)
    if x.base not in {None, IDENTITY} or x.sparse or x.d is not None or x.blocks is not None:
        return None
    low = tuple((p, found.emit(aten.mm.default, q, right)) for p, q in x.low)
    if x.base is None:
        return Form(low=low)
    if y is None:
        return None
    scaled = y if x.c is None else _scale_rows(found, y, x.c)
    return replace(scaled, low=scaled.low + low)


@_rule("factor", aten.mm.default)
def _match_factor(found: Analysis, node: fx.Node) -> Form | None:
    """B (n, r) · A (r, m) is low-rank where applying the factors costs less than the product's n·m."""
    left, right = node.args
    if found.form(left) is not None or found.form(right) is not None:
        return None
    (n, r), (_, m) = shape_of(left), shape_of(right)
    if not found.pays(node, r, n, m):
        return None
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    return Form(low=((left, right),))


@_rule("sum", aten.add.Tensor, aten.sub.Tensor)
def _match_sum(found: Analysis, node: fx.Node) -> Form | None:
    """X + α·Y has the terms of both; where both have a base, the scales of the base are added."""
    left, right = node.args[:2]
    x, y = found.form(left), found.form(right)
    if x is None or y is None or shape_of(left) != shape_of(right):
        return None
    alpha = node.kwargs.get("alpha", 1)
    if node.target == aten.sub.Tensor:
        alpha = -alpha  # type: ignore[operator]  # a number
    if alpha != 1:
        y = _scale_by_number(found, node, y, alpha)
    return _add_forms(found, node, x, y)


def _add_forms(found: Analysis, node: fx.Node, x: Form, y: Form) -> Form | None:
    low, sparse = x.low + y.low, x.sparse + y.sparse
    if x.base is None or y.base is None:
        return replace(x if y.base is None else y, low=low, sparse=sparse)
    if x.base != y.base or any(side is not None for side in (x.d, y.d, x.blocks, y.blocks)):
        return None
    scales = [form.c for form in (x, y) if form.c is not None]
    summands = (*scales, 1.0)[:2]
    c = found.emit(aten.add.Tensor, *summands) if scales else _constant_column(found, node, 2.0)
    return Form(x.base, c, None, low, sparse)


@_rule("addmm", aten.addmm.default)
def _match_addmm(found: Analysis, node: fx.Node) -> Form | None:
    """addmm(C, X, Y) = β·C + α·X·Y, with X·Y low-rank."""
    c, left, right = node.args
    form = found.form(c)
    if form is None or shape_of(c) != shape_of(node) or found.form(left) or found.form(right):
        return None
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    form = form if beta == 1 else _scale_by_number(found, node, form, beta)
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    return _add_forms(found, node, form, _scale_by_number(found, node, Form(low=((left, right),)), alpha))


@_rule("scale", aten.mul.Tensor)
def _match_scale(found: Analysis, node: fx.Node) -> Form | None:
    """s·X, c∘X and X∘d scale every term."""
    left, right = node.args[:2]
    if found.form(left) is None:
        left, right = right, left
    form = found.form(left)
    if form is None or found.form(right) is not None:
        return None
    return _scale_by(found, node, left, form, right)


def _scale_by(found: Analysis, node: fx.Node, matrix: object, form: Form, factor: object) -> Form | None:
    """Multiply a matrix by a number, a column or a row; return None for other factors."""
    if shape_of(matrix) != shape_of(node):
        return None
    rows, columns = shape_of(node)
    shape = shape_of(factor)
    if torch.Size(shape).numel() == 1:
        return _scale_by_number(found, node, form, found.emit(aten.view.default, factor, []) if shape else factor)
    assert isinstance(factor, fx.Node)
    if shape == (rows, 1):
        return _scale_rows(found, form, factor)
    if shape in {(1, columns), (columns,)}:
        return _scale_columns(found, form, factor)
    return None


@_rule("hadamard", aten.mul.Tensor)
def _match_hadamard(found: Analysis, node: fx.Node) -> Form | None:
    """(Σ P·Q)∘(Σ R·S) = Σ (P∗R)·(Q∗S), where ∗ multiplies every column of P with every column of R."""
    x, y = (found.form(operand) for operand in node.args[:2])
    if x is None or y is None or any(form.base or form.sparse for form in (x, y)):
        return None
    n, m = shape_of(node)
    if any(shape_of(operand) != (n, m) for operand in node.args[:2]):
        return None
    rank = math.prod(sum(shape_of(a)[0] for _, a in form.low) for form in (x, y))
    # Factors have at most as many columns as the matrix: more columns are linearly dependent.
    if rank > max(n, m) or not found.pays(node, rank, n, m):
        return None
    pairs = (
        (_pairwise_products(found, p, r, 1), _pairwise_products(found, q, s, 0)) for p, q in x.low for r, s in y.low
    )
    return Form(low=tuple(pairs))


def _pairwise_products(found: Analysis, left: fx.Node, right: fx.Node, dim: int) -> fx.Node:
    """Multiply every column (dim 1) or row (dim 0) of one matrix with every column or row of the other."""
    wide = found.emit(aten.unsqueeze.default, left, dim + 1), found.emit(aten.unsqueeze.default, right, dim)
    shape = list(shape_of(left))
    shape[dim] *= shape_of(right)[dim]
    return found.emit(aten.reshape.default, found.emit(aten.mul.Tensor, *wide), shape)


@_rule("quotient", aten.div.Tensor, aten.neg.default)
def _match_quotient(found: Analysis, node: fx.Node) -> Form | None:
    """X / s = X·(1/s), for a number, a column or a row; −X = X / −1."""
    arguments: Operands = node.args
    matrix, divisor = (*arguments, -1.0)[:2]
    form = found.form(matrix)
    if form is None or found.form(divisor) is not None:
        return None
    inverse = found.emit(aten.reciprocal.default, divisor) if isinstance(divisor, fx.Node) else 1.0 / divisor
    return _scale_by(found, node, matrix, form, inverse)


def _scale_by_number(found: Analysis, node: fx.Node, form: Form, number: object) -> Form:
    if not isinstance(number, fx.Node) and number == 1:
        return form
    c = form.c
    if form.base is not None:
        c = _constant_column(found, node, number) if form.c is None else found.emit(aten.mul.Tensor, form.c, number)
    low = tuple((found.emit(aten.mul.Tensor, b, number), a) for b, a in form.low)
    sparse = tuple((rows, cols, found.emit(aten.mul.Tensor, v, number)) for rows, cols, v in form.sparse)
    return replace(form, c=c, low=low, sparse=sparse)


def _constant_column(found: Analysis, node: fx.Node, number: object) -> fx.Node:
    """Return a number as the column (n, 1) that scales the rows of ``node``."""
    ones = found.emit(aten.new_ones.default, found.like, [shape_of(node)[0], 1])
    return found.emit(aten.mul.Tensor, ones, number)


def _scale_rows(found: Analysis, form: Form, column: fx.Node) -> Form:
    low = tuple((found.emit(aten.mul.Tensor, b, column), a) for b, a in form.low)
    sparse = tuple((rows, cols, _scale_entries(found, v, column, rows)) for rows, cols, v in form.sparse)
    return replace(form, c=found.times(form.c, column) if form.base else None, low=low, sparse=sparse)


def _scale_columns(found: Analysis, form: Form, row: fx.Node) -> Form:
    low = tuple((b, found.emit(aten.mul.Tensor, a, row)) for b, a in form.low)
    sparse = tuple((rows, cols, _scale_entries(found, v, row, cols)) for rows, cols, v in form.sparse)
    form = replace(form, low=low, sparse=sparse)
    if form.blocks is not None:
        number, size, _ = shape_of(form.blocks)
        return replace(form, blocks=found.times(form.blocks, found.emit(aten.view.default, row, [number, 1, size])))
    return replace(form, d=found.times(form.d, row) if form.base else None)


def _scale_entries(found: Analysis, values: fx.Node, scale: fx.Node, positions: fx.Node) -> fx.Node:
    flat = found.emit(aten.view.default, scale, [-1])
    return found.emit(aten.mul.Tensor, values, found.emit(aten.index_select.default, flat, 0, positions))


@_rule("scatter", aten.index_put.default)
def _match_scatter(found: Analysis, node: fx.Node) -> Form | None:
    """X with values added at (rows, cols)."""
    arguments: Operands = node.args
    target, indices, values, *rest = arguments
    accumulate = rest[0] if rest else node.kwargs.get("accumulate", False)
    form = found.form(target)
    if form is None or not accumulate or len(indices) != 2 or None in indices:
        return None
    rows, cols = indices
    flat = len(shape_of(rows)) == 1 and shape_of(rows) == shape_of(cols) == shape_of(values)
    if not flat or torch.bool in {rows.meta["val"].dtype, cols.meta["val"].dtype}:
        found.misses.append(f"{node.name}: its positions are not two lists of the length of its values")
        return None
    return replace(form, sparse=(*form.sparse, (rows, cols, values)))


@_rule("transpose", aten.t.default)
def _match_transpose(found: Analysis, node: fx.Node) -> Form | None:
    """(Σ B·A)ᵀ = Σ Aᵀ·Bᵀ and Dᵀ is block-diagonal; a form that contains W is not transposed."""
    form = found.form(node.args[0])
    if form is None or form.base not in {None, IDENTITY} or (form.blocks is not None and form.c is not None):
        return None
    low = tuple((found.emit(aten.t.default, a), found.emit(aten.t.default, b)) for b, a in form.low)
    sparse = tuple((cols, rows, values) for rows, cols, values in form.sparse)
    c = found.emit(aten.t.default, form.d) if form.d is not None else None
    d = found.emit(aten.t.default, form.c) if form.c is not None else None
    blocks = found.emit(aten.transpose.int, form.blocks, 1, 2) if form.blocks is not None else None
    return Form(form.base, c, d, low, sparse, blocks)


RULES: tuple[AlgebraRule, ...] = (
    *_rules,
    AlgebraRule("rows", (aten.view.default, aten._unsafe_view.default), match_row_block),
    AlgebraRule("joined", (aten.view.default,), match_joined_blocks),
)
"""All rules, tried in this order at each node. Functions of ``reduction`` take another tuple, so that tests can omit
rules."""
