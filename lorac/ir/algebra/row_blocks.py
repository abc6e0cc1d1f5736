"""Rules for a weight that is split by rows, changed in blocks and joined: low-rank blocks give a low-rank W."""

import operator
from dataclasses import dataclass

import torch
from torch import fx

from lorac.argument_types import Operands
from lorac.ir.algebra.structure import WEIGHT, Analysis, Form, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class _RowBlock:
    """Rows of a matrix (n, m) viewed as (groups, n/groups, m): ``size`` rows of each group, starting at ``first``."""

    source: fx.Node
    groups: int
    first: int
    size: int

    @property
    def length(self) -> int:
        """The number of rows of a group."""
        return shape_of(self.source)[0] // self.groups

    def pad(self, found: Analysis, matrix: fx.Node) -> fx.Node:
        """Pad a matrix (rows of the block, r) with zeros to the rows of the whole matrix."""
        around = [0, 0, self.first, self.length - self.first - self.size]
        grouped = found.emit(aten.reshape.default, matrix, [self.groups, self.size, -1])
        padded = found.emit(aten.constant_pad_nd.default, grouped, around)
        return found.emit(aten.reshape.default, padded, [self.groups * self.length, -1])

    def shift(self, found: Analysis, rows: fx.Node) -> fx.Node:
        """Convert row indices of the block to row indices of the whole matrix."""
        group = found.emit(aten.floor_divide.default, rows, self.size)
        before = found.emit(aten.mul.Tensor, group, self.length - self.size)
        return found.emit(aten.add.Tensor, found.emit(aten.add.Tensor, rows, before), self.first)


def match_row_block(found: Analysis, node: fx.Node) -> Form | None:
    """X[i] of W = [X[0]; X[1]; …], split by rows, is a base."""
    block = _row_block_of(node)
    return Form(base=node) if block is not None and found.form(block.source) == Form(WEIGHT) else None


def _row_block_of(node: fx.Node) -> _RowBlock | None:
    """Return the rows in a node that is an item of ``split`` on the second axis of a view (groups, n/groups, m)."""
    operands: Operands = node.args
    part = operands[0]
    part = part.args[0] if part.target is aten.clone.default else part
    split = part.args[0] if part.target is operator.getitem else part
    if split is part or split.target is not aten.split_with_sizes.default or split.args[2:] != (1,):
        return None
    grouped, sizes = split.args[:2]
    source, number = grouped.args[0], part.args[1]
    if grouped.target is not aten.view.default or len(shape_of(grouped)) != 3:
        return None
    groups, length, columns = shape_of(grouped)
    if shape_of(source) != (groups * length, columns) or shape_of(node) != (groups * sizes[number], columns):
        return None
    return _RowBlock(source, groups, sum(sizes[:number]), sizes[number])


def match_joined_blocks(found: Analysis, node: fx.Node) -> Form | None:
    """[c∘X[0] + Σ B·A; X[1]; …] = [c; 1; …]∘W + Σ [B; 0; …]·A."""
    operands: Operands = node.args
    cat = operands[0]
    if cat.target is not aten.cat.default or cat.args[1:] != (1,):
        return None
    parts = []
    for viewed in cat.args[0]:  # each is a changed block of rows, viewed in groups
        form = found.form(viewed.args[0]) if viewed.target is aten.view.default else None
        block = _row_block_of(form.base) if form is not None and isinstance(form.base, fx.Node) else None
        if form is None or block is None:
            return None
        parts.append((form, block))
    blocks = [block for _, block in parts]
    first, sizes = blocks[0], [block.size for block in blocks]
    # The blocks must be all rows of one matrix in order, joined as they were split.
    in_order = [block.first for block in blocks] == [sum(sizes[:i]) for i in range(len(sizes))]
    alike = all((block.source, block.groups) == (first.source, first.groups) for block in blocks)
    whole = shape_of(node) == shape_of(first.source) and shape_of(cat)[:2] == (first.groups, first.length)
    if not (in_order and alike and whole):
        return None
    if any(form.d is not None or form.blocks is not None for form, _ in parts):
        found.misses.append(f"{node.name}: one block of rows changes its inputs, which all blocks share")
        return None
    low = tuple((block.pad(found, b), a) for form, block in parts for b, a in form.low)
    sparse = tuple(
        (block.shift(found, rows), cols, values) for form, block in parts for rows, cols, values in form.sparse
    )
    if low and not found.pays(node, sum(shape_of(a)[0] for _, a in low), *shape_of(node)):
        return None
    c = None
    if any(form.c is not None for form, _ in parts):
        shapes = [[block.groups, block.size, 1] for block in blocks]
        columns = [
            found.emit(aten.new_ones.default, found.like, shape)
            if form.c is None
            else found.emit(aten.reshape.default, form.c, shape)
            for (form, _), shape in zip(parts, shapes, strict=True)
        ]
        c = found.emit(aten.reshape.default, found.emit(aten.cat.default, columns, 1), [shape_of(node)[0], 1])
    return Form(WEIGHT, c, low=low, sparse=sparse)
