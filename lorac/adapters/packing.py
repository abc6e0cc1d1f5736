"""Prepared adapters in a few blocks of memory, as programs with places for rows take them."""

from __future__ import annotations

import collections
from dataclasses import replace

import torch

from lorac.ir.algebra.changes import Change, LowRank, from_outputs, iter_tensors, to_outputs
from lorac.ir.slots.plans import PreparedAdapter
from lorac.ir.slots.stacks import StackShape
from lorac.variants.adapter import Adapter

Tensor = torch.Tensor


def pack_adapter(prepared: PreparedAdapter, adapter: Adapter) -> PreparedAdapter:
    """Return an adapter whose low-rank tensors of equal shape lie one behind the other, in the order of its sites.

    What several sites share stays one tensor, and what is the adapter's own tensor stays that.

    Args:
        adapter: the adapter that was prepared.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in adapter.parameters()}
    found = [t for change in prepared.changes.values() if isinstance(change, LowRank) for t in iter_tensors(change)]
    uses = collections.Counter(map(id, found))
    groups: dict[tuple[torch.dtype, torch.Size], list[Tensor]] = {}
    for tensor in found:
        if uses[id(tensor)] == 1 and tensor.numel() and tensor.untyped_storage().data_ptr() not in own:
            groups.setdefault((tensor.dtype, tensor.shape), []).append(tensor)
    packed: dict[int, Tensor] = {}
    for (dtype, shape), group in groups.items():
        stack = torch.stack(group, out=StackShape(len(group), shape, dtype).new())
        packed |= {id(tensor): place for tensor, place in zip(group, stack.unbind(), strict=True)}
    return replace(prepared, changes={path: _exchange(change, packed) for path, change in prepared.changes.items()})


def _exchange(change: Change, packed: dict[int, Tensor]) -> Change:
    """Return a low-rank change with other tensors in the place of some of its own, by identity."""
    if not isinstance(change, LowRank):
        return change
    form, parts = to_outputs(change)
    return from_outputs(form, {name: packed.get(id(tensor), tensor) for name, tensor in parts.items()}, None)
