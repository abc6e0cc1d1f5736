"""Writing merged weights into buffers an engine reads, always from the base, at the cost of the form.

A buffer is written from its base and the new change, whatever it held before: low-rank and dense changes overwrite it
whole, sparse ones restore the positions of the last sparse change and set their own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lorac.ir.algebra import operands as letters
from lorac.ir.algebra.changes import (
    Change,
    Dense,
    LowRank,
    Sparse,
    SparseSum,
    add_product,
    device_of,
    merge_bias,
    merge_weight,
    moved,
)
from lorac.ir.sites import BaseReader, Site, SiteKind
from lorac.ir.slots.layouts import layout_of
from lorac.ir.slots.plans import SitePlan
from lorac.ir.slots.roles import slot_name

Tensor = torch.Tensor


_UNDEFINED = Dense(torch.empty(0))
"""What a buffer holds while it is written."""


@dataclass(eq=False)
class _SparsePatch:
    """A sparse change as positions in the buffer's memory: what to write, and what the base holds there."""

    positions: Tensor
    written: Tensor
    original: Tensor


class FusedBuffer:
    """The weight (and bias) of one site, as an engine reads it.

    Args:
        site: the site.
        buffer: contiguous memory the engine reads, at first holding the base.
        matrix_of: buffer memory -> its view as a matrix (out, in).
        base: reads W (out, in), unchanged for the buffer's whole life.
        bias, base_bias: memory the engine reads the bias from, and the base's bias; None where there is none.
    """

    def __init__(
        self,
        site: Site,
        buffer: Tensor,
        matrix_of: Callable[[Tensor], Tensor],
        base: Callable[[], Tensor],
        bias: Tensor | None = None,
        base_bias: Tensor | None = None,
    ) -> None:
        self.site, self.buffer, self.matrix_of, self.base = site, buffer, matrix_of, base
        self.bias, self.base_bias = bias, base_bias
        self.holds: Change | None = None
        # The matrix of a grouped kernel is block-diagonal: no view of the buffer.
        self._grouped = site.conv is not None and site.conv.groups > 1
        self._patches: weakref.WeakKeyDictionary[Change, _SparsePatch] = weakref.WeakKeyDictionary()
        self._moved: weakref.WeakKeyDictionary[Change, Change] = weakref.WeakKeyDictionary()

    @torch.no_grad()
    def write(self, change: Change | None) -> int:
        """Make the buffer hold ``change`` (None: the base); returns the bytes written."""
        change = None if change is None else self._here(change)
        if change is self.holds:
            return 0
        # Until it is done the content is nobody's: a write that fails half-way must not pass for what was there.
        held, self.holds = self.holds, _UNDEFINED
        written = self._write(change, held)
        self.holds = change
        return written

    def forget(self) -> None:
        """Somebody else wrote into the memory: what it holds is not known, and the next write writes all of it."""
        self.holds = _UNDEFINED

    def _here(self, change: Change) -> Change:
        """A change in the memory that the buffer is in: it is brought there once."""
        if device_of(change) == self.buffer.device:
            return change
        if change not in self._moved:
            self._moved[change] = moved(change, self.buffer.device)
        return self._moved[change]

    def _write(self, change: Change | None, held: Change | None) -> int:
        if self._grouped:
            self.buffer.copy_(self.site.store(self.base() if change is None else merge_weight(change, self.base())))
            written = self.buffer.nbytes
        elif isinstance(change, Sparse | SparseSum) and isinstance(held, Sparse | SparseSum | None):
            written = self._write_sparse(change, held)
        elif change is None and isinstance(held, Sparse | SparseSum):
            written = self._restore(held)
        else:
            written = self._write_whole(change)
        if self.bias is not None:
            new_bias = None if change is None else merge_bias(change, self.base_bias)
            start = new_bias if new_bias is not None else self.base_bias
            self.bias.copy_(start) if start is not None else self.bias.zero_()
        return written

    def _write_whole(self, change: Change | None) -> int:
        target, base = self.matrix_of(self.buffer), self.base()
        change = change.folded() if isinstance(change, LowRank) else change
        if change is None:
            target.copy_(base)
        elif isinstance(change, LowRank) and not change.parts and change.a.dtype == base.dtype:
            add_product(base, change.b.mT, change.a.mT, out=target)
        elif isinstance(change, Dense):
            target.copy_(change.weight)
        else:
            target.copy_(merge_weight(change, base))
        return self.buffer.nbytes

    def _write_sparse(self, change: Sparse | SparseSum, held: Change | None) -> int:
        written = self._restore(held)
        patch = self._patch(change)
        self._flat().index_copy_(0, patch.positions, patch.written)
        return written + patch.written.nbytes

    def _restore(self, held: Change | None) -> int:
        if not isinstance(held, Sparse | SparseSum):
            return 0
        patch = self._patch(held)
        self._flat().index_copy_(0, patch.positions, patch.original)
        return patch.original.nbytes

    def _flat(self) -> Tensor:
        return self.buffer.view(-1)

    def _patch(self, change: Sparse | SparseSum) -> _SparsePatch:
        known = self._patches.get(change)
        if known is None:
            known = self._patches[change] = self._make_patch(change)
        return known

    def _make_patch(self, change: Sparse | SparseSum) -> _SparsePatch:
        terms = ((1.0, change),) if isinstance(change, Sparse) else change.terms
        base = self.base()
        strides = self.matrix_of(self.buffer).stride()
        columns = base.shape[1]
        flat = torch.cat([term.rows * columns + term.cols for _, term in terms])
        unique, places = torch.unique(flat, return_inverse=True)
        rows, cols = unique // columns, unique % columns
        original = base[rows, cols]
        written = original.clone()
        start = 0
        for strength, term in terms:
            here = places[start : start + term.rows.numel()]
            added = term.values if strength == 1 else term.values * strength
            written.index_put_((here,), added.to(written.dtype), accumulate=True)
            start += term.rows.numel()
        # In the order of memory: scattering back and forth costs more.
        positions, order = torch.sort(rows * strides[0] + cols * strides[1])
        return _SparsePatch(positions, written[order], original[order])


def base_on_device(base: BaseReader, place: torch.device) -> BaseReader:
    """A reader of base weights that brings them to a device, where buffers for them then lie."""

    def bias(site: Site) -> torch.Tensor | None:
        found = base.bias(site)
        return None if found is None else found.to(place)

    return BaseReader(lambda site: base.weight(site).to(place), bias)


def make_fused_buffers(
    plans: Mapping[str, SitePlan], base: BaseReader
) -> tuple[dict[str, FusedBuffer], dict[str, Tensor]]:
    """A buffer per bound weight, in slot layout and holding the base, and the memory by slot name."""
    buffers, memory = {}, {}
    for path, plan in plans.items():
        if not plan.bound:
            continue
        site = plan.site
        unchanged = _constant_reader(base.weight(site))
        weight = layout_of(site).slot_weight(unchanged()).clone(memory_format=torch.contiguous_format)
        memory[slot_name(path, letters.WEIGHT)] = weight
        bias = None
        if letters.BIAS in plan.room:
            original = base.bias(site)
            bias = weight.new_zeros(site.out_features) if original is None else original.clone()
            memory[slot_name(path, letters.BIAS)] = bias
        matrix_of = _matrix_view_of(plan)
        buffers[path] = FusedBuffer(site, weight, matrix_of, unchanged, bias, base.bias(site))
    return buffers, memory


def _constant_reader(tensor: Tensor) -> Callable[[], Tensor]:
    """A reader of one tensor; to map a file anew at every swap costs as much as the write itself."""
    return lambda: tensor


def _matrix_view_of(plan: SitePlan) -> Any:
    site = plan.site
    if site.kind in {SiteKind.LINEAR, SiteKind.EMBEDDING}:
        return lambda buffer: buffer.t()
    return site.present
