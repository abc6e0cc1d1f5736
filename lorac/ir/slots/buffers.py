"""Buffers of merged weights that an engine reads, each written from the base and a change.

A buffer's earlier content does not matter: low-rank and dense changes overwrite all of it, and sparse changes restore
the positions of the last sparse change before they write their own.
"""

import functools
import itertools
import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lorac.ir.algebra import operands
from lorac.ir.algebra.changes import (
    Change,
    Dense,
    LowRank,
    Sparse,
    SparseSum,
    list_tensors,
    map_tensors,
    merge_bias,
    merge_weight,
)
from lorac.ir.sites.site import BaseReader, Site, SiteKind
from lorac.ir.slots.layouts import layout_of, mark_beyond
from lorac.ir.slots.plans import SitePlan
from lorac.ir.slots.roles import slot_name
from lorac.ir.slots.weight_writes import SparseWrites, write_product

_UNDEFINED = Dense(torch.empty(0))
"""The change of a buffer whose content is unknown, as it is during a write."""


class FusedBuffer:
    """The memory from which an engine reads the weight and bias of one site.

    Args:
        buffer: contiguous memory that contains the base's weight at first.
        matrix_of: buffer memory -> its view as a matrix (out, in).
        base: the function that reads W (out, in), which never changes.
        bias: memory of the bias, or None.
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
        self.current: Change | None = None
        # A grouped kernel's matrix is block-diagonal and so not a view of the buffer.
        self._grouped = site.conv is not None and site.conv.groups > 1
        self._patches: weakref.WeakKeyDictionary[Change, tuple[Tensor, Tensor, Tensor]] = weakref.WeakKeyDictionary()
        self._moved: weakref.WeakKeyDictionary[Change, Change] = weakref.WeakKeyDictionary()

    def write(self, change: Change | None) -> int:
        """Write a change into the buffer, or the base for None; return the number of bytes written."""
        sparse = SparseWrites()
        written = self.start_write(change, sparse)
        sparse.run()
        return written

    @torch.no_grad()
    def start_write(self, change: Change | None, sparse: SparseWrites) -> int:
        """Write as ``write``, but append the writes of sparse changes to ``sparse``, which the caller must run.

        The content counts as unknown until the caller runs them.
        """
        device = self.buffer.device
        if change is not None and list_tensors(change)[0].device != device:
            if change not in self._moved:  # cache one copy per change
                self._moved[change] = map_tensors(lambda tensor: tensor.to(device), change)
            change = self._moved[change]
        if change is self.current:
            return 0
        # If a write fails, the buffer must not count as unchanged.
        previous, self.current = self.current, _UNDEFINED
        written = self._write(change, previous, sparse)
        sparse.then(functools.partial(setattr, self, "current", change))
        return written

    def forget(self) -> None:
        """Mark the content as unknown after an external write, so that the next write is a full one."""
        self.current = _UNDEFINED

    def _write(self, change: Change | None, previous: Change | None, sparse: SparseWrites) -> int:
        if self._grouped:
            self.buffer.copy_(self.site.store(self.base() if change is None else merge_weight(change, self.base())))
            written = self.buffer.nbytes
        elif isinstance(change, Sparse | SparseSum | None) and isinstance(previous, Sparse | SparseSum | None):
            # Restore the positions of the previous sparse change, and write the new values.
            changes: list[Sparse | SparseSum] = [one for one in (previous, change) if one is not None]
            written = 0
            for each in changes:
                positions, original, new = self._find_patch(each)
                values = original if each is previous else new
                sparse.add(self.buffer, positions, values)
                written += values.nbytes
        else:
            target, base = self.matrix_of(self.buffer), self.base()
            whole = change.folded() if isinstance(change, LowRank) else change
            if whole is None:
                target.copy_(base)
            elif isinstance(whole, LowRank) and not whole.scales and whole.a.dtype == base.dtype:
                write_product(base, whole.b.mT, whole.a.mT, out=target)
            else:
                target.copy_(whole.weight if isinstance(whole, Dense) else merge_weight(whole, base))
            written = self.buffer.nbytes
        if self.bias is not None:
            bias = self.base_bias if change is None else merge_bias(change, self.base_bias)
            self.bias.copy_(bias) if bias is not None else self.bias.zero_()
        return written

    def _find_patch(self, change: Sparse | SparseSum) -> tuple[Tensor, Tensor, Tensor]:
        """Return a change's positions in the buffer's memory, the base's values there, and the new values."""
        if change not in self._patches:
            terms = ((1.0, change),) if isinstance(change, Sparse) else change.terms
            base = self.base()
            strides = self.matrix_of(self.buffer).stride()
            columns = base.shape[1]
            flat = torch.cat([term.rows * columns + term.cols for _, term in terms])
            unique, inverse = torch.unique(flat, return_inverse=True)
            rows, cols = unique // columns, unique % columns
            original = base[rows, cols]
            new = original.clone()
            parts = inverse.split([term.rows.numel() for _, term in terms])
            for (strength, term), indices in zip(terms, parts, strict=True):
                values = term.values if strength == 1 else term.values * strength
                new.index_put_((indices,), values.to(new.dtype), accumulate=True)
            # Sorted by address, since writes in random order are slower.
            positions, order = torch.sort(rows * strides[0] + cols * strides[1])
            self._patches[change] = positions, original[order], new[order]
        return self._patches[change]


def base_on_device(base: BaseReader, device: torch.device) -> BaseReader:
    """Return a reader that copies base weights to a device, for buffers on that device."""

    def bias(site: Site) -> torch.Tensor | None:
        tensor = base.bias(site)
        return None if tensor is None else tensor.to(device)

    return BaseReader(lambda site: base.weight(site).to(device), bias)


@torch.inference_mode(False)  # tensors made in inference mode cannot be written outside it
def make_fused_buffers(
    plans: Mapping[str, SitePlan], base: BaseReader
) -> tuple[dict[str, FusedBuffer], dict[str, Tensor]]:
    """Make a buffer per bound weight, filled with the base; return the buffers, and the memory by slot name."""
    buffers, memory = {}, {}
    for path, plan in plans.items():
        if not plan.bound:
            continue
        site = plan.site
        base_weight = base.weight(site)
        weight = layout_of(site).slot_weight(base_weight).clone(memory_format=torch.contiguous_format)
        memory[slot_name(path, operands.WEIGHT)] = weight
        bias, base_bias = None, base.bias(site)
        if operands.BIAS in plan.room:
            bias = weight.new_zeros(site.out_features) if base_bias is None else base_bias.clone()
            mark_beyond(bias, site)
            memory[slot_name(path, operands.BIAS)] = bias
        matrix_of = torch.t if site.kind in {SiteKind.LINEAR, SiteKind.EMBEDDING} else site.present
        # Read the weight once: mapping a file again at every swap would cost as much as the write.
        reader = itertools.repeat(base_weight).__next__
        buffers[path] = FusedBuffer(site, weight, matrix_of, reader, bias, base_bias)
    return buffers, memory
