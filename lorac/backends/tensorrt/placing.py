"""Where a plan reads from: memory of the GPU where there is one, else the tensors as they are.

What is written into weights is written by torch's own kernels there: scattered where a change is sparse, whole else,
always from the base.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from lorac.ir.algebra.changes import Change, Dense, LowRank, Sparse, SparseSum
from lorac.ir.host.sites import BaseReader, Site

Tensor = torch.Tensor


class Placing:
    """Tensors as a plan reads them: in a device's memory and contiguous; of one tensor there is one such copy.

    Args:
        device: whose memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies = WeakTensorKeyDictionary()
        self._changes: weakref.WeakKeyDictionary[Change, Change] = weakref.WeakKeyDictionary()

    def placed(self, tensor: Tensor) -> Tensor:
        """A tensor there; itself, where it lies so already."""
        if tensor.device == self.device and tensor.is_contiguous():
            return tensor.detach()
        known = self._copies.get(tensor)
        if known is None:
            known = self._copies[tensor] = tensor.detach().to(self.device).contiguous()
        return known

    def all_of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors there, by name."""
        return {name: self.placed(tensor) for name, tensor in tensors.items()}

    def base(self, base: BaseReader) -> BaseReader:
        """A reader of base weights that gives them there."""

        def bias(site: Site) -> Tensor | None:
            held = base.bias(site)
            return None if held is None else held.to(self.device)

        return BaseReader(lambda site: base.weight(site).to(self.device), bias)

    def change(self, change: Change) -> Change:
        """A change whose tensors are there; itself, where they are already. Of one change there is one such copy."""
        if all(tensor.device == self.device for tensor in _tensors(change)):
            return change
        known = self._changes.get(change)
        if known is None:
            known = self._changes[change] = self._moved(change)
        return known

    def _moved(self, change: Change) -> Change:
        placed = self.placed
        e = None if change.e is None else placed(change.e)
        match change:
            case Dense():
                return Dense(placed(change.weight), e)
            case Sparse():
                return self._sparse(change)
            case SparseSum():
                return SparseSum(tuple((t, self._sparse(term)) for t, term in change.terms), e)
            case LowRank():
                return LowRank(placed(change.a), placed(change.b), self.all_of(change.parts), e)

    def _sparse(self, change: Sparse) -> Sparse:
        e = None if change.e is None else self.placed(change.e)
        return Sparse(self.placed(change.rows), self.placed(change.cols), self.placed(change.values), e)


def _tensors(change: Change) -> Iterator[Tensor]:
    """The tensors that a change consists of."""
    shift = () if change.e is None else (change.e,)
    match change:
        case Dense():
            yield from (change.weight, *shift)
        case Sparse():
            yield from (change.rows, change.cols, change.values, *shift)
        case SparseSum():
            yield from (tensor for _, term in change.terms for tensor in _tensors(term))
            yield from shift
        case LowRank():
            yield from (change.a, change.b, *change.parts.values(), *shift)
