"""Rules for a weight that is cut by rows, changed in parts and joined again: what is low-rank in a part is so in W."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lorac.ir.algebra.structure import WEIGHT, Analysis, Form, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class _RowBlock:
    """Rows of a matrix (n, m) that is cut as (groups, n/groups, m): of each group ``size`` from ``first`` on."""

    source: fx.Node
    groups: int
    first: int
    size: int

    @property
    def length(self) -> int:
        """How many rows a group has."""
        return shape_of(self.source)[0] // self.groups


def rows(found: Analysis, node: fx.Node) -> Form | None:
    """X[i] of W = [X[0]; X[1]; …], cut by rows, is a base of its own."""
    piece = _row_block_of(node)
    return Form(base=node) if piece is not None and found.form(piece.source) == Form(WEIGHT) else None


def _row_block_of(node: fx.Node) -> _RowBlock | None:
    """Which rows a node is: a part of ``split``, along the second axis of a matrix viewed as (groups, n/groups, m)."""
    part: Any = node.args[0]
    part = part.args[0] if part.target is aten.clone.default else part
    cut: Any = part.args[0] if part.target is operator.getitem else part
    if cut is part or cut.target is not aten.split_with_sizes.default or cut.args[2:] != (1,):
        return None
    grouped, sizes = cut.args[:2]
    source, number = grouped.args[0], part.args[1]
    if grouped.target is not aten.view.default or len(shape_of(grouped)) != 3:
        return None
    groups, length, columns = shape_of(grouped)
    if shape_of(source) != (groups * length, columns) or shape_of(node) != (groups * sizes[number], columns):
        return None
    return _RowBlock(source, groups, sum(sizes[:number]), sizes[number])


def match_joined_blocks(found: Analysis, node: fx.Node) -> Form | None:
    """[c∘X[0] + Σ B·A; X[1]; …] = [c; 1; …]∘W + Σ [B; 0; …]·A."""
    cat: Any = node.args[0]
    if cat.target is not aten.cat.default or cat.args[1:] != (1,):
        return None
    whole = [part for part in map(functools.partial(_changed_block, found), cat.args[0]) if part is not None]
    if not whole or len(whole) != len(cat.args[0]) or not _cover_matrix(node, cat, [piece for _, piece in whole]):
        return None
    if any(form.d is not None or form.blocks is not None for form, _ in whole):
        found.misses.append(f"{node.name}: a part changes its own inputs, which all parts have in common")
        return None
    low = tuple((_pad_rows(found, b, piece), a) for form, piece in whole for b, a in form.low)
    sparse = tuple(
        (_shift_row_indices(found, places, piece), cols, values)
        for form, piece in whole
        for places, cols, values in form.sparse
    )
    if low and not found.pays(node, sum(shape_of(a)[0] for _, a in low), *shape_of(node)):
        return None
    return Form(WEIGHT, _join_scales(found, node, whole), low=low, sparse=sparse)


def _changed_block(found: Analysis, viewed: fx.Node) -> tuple[Form, _RowBlock] | None:
    """What was made of a piece's rows, of a part viewed in groups again."""
    form = found.form(viewed.args[0]) if viewed.target is aten.view.default else None
    piece = _row_block_of(form.base) if form is not None and isinstance(form.base, fx.Node) else None
    return None if form is None or piece is None else (form, piece)


def _cover_matrix(node: fx.Node, cat: fx.Node, pieces: Sequence[_RowBlock]) -> bool:
    """Whether pieces are all the rows of one matrix in their order, and put together as it was cut."""
    first, sizes = pieces[0], [piece.size for piece in pieces]
    in_order = [piece.first for piece in pieces] == [sum(sizes[:i]) for i in range(len(sizes))]
    alike = all((piece.source, piece.groups) == (first.source, first.groups) for piece in pieces)
    whole = shape_of(node) == shape_of(first.source) and shape_of(cat)[:2] == (first.groups, first.length)
    return in_order and alike and whole


def _pad_rows(found: Analysis, matrix: fx.Node, piece: _RowBlock) -> fx.Node:
    """A matrix (rows of the piece, r) where the piece lies in the whole."""
    around = [0, 0, piece.first, piece.length - piece.first - piece.size]
    grouped = found.emit(aten.reshape.default, matrix, [piece.groups, piece.size, -1])
    padded = found.emit(aten.constant_pad_nd.default, grouped, around)
    return found.emit(aten.reshape.default, padded, [piece.groups * piece.length, -1])


def _shift_row_indices(found: Analysis, places: fx.Node, piece: _RowBlock) -> fx.Node:
    """Numbers of a piece's rows as those of the whole."""
    group = found.emit(aten.floor_divide.default, places, piece.size)
    before = found.emit(aten.mul.Tensor, group, piece.length - piece.size)
    return found.emit(aten.add.Tensor, found.emit(aten.add.Tensor, places, before), piece.first)


def _join_scales(found: Analysis, node: fx.Node, parts: Sequence[tuple[Form, _RowBlock]]) -> fx.Node | None:
    if all(form.c is None for form, _ in parts):
        return None
    columns = [
        found.emit(aten.new_ones.default, found.like, [piece.groups, piece.size, 1])
        if form.c is None
        else found.emit(aten.reshape.default, form.c, [piece.groups, piece.size, 1])
        for form, piece in parts
    ]
    return found.emit(aten.reshape.default, found.emit(aten.cat.default, columns, 1), [shape_of(node)[0], 1])
