"""Prepared adapters in a few blocks of memory, as programs with places for rows take them."""

import collections
from dataclasses import replace

import torch
from torch import Tensor

from lorac.ir.algebra.changes import Change, LowRank, SparseSum, from_outputs, iter_tensors, to_outputs
from lorac.ir.slots.plans import PreparedAdapter
from lorac.ir.slots.stacks import StackShape
from lorac.variants.adapter import Adapter


def pack_adapter(prepared: PreparedAdapter, adapter: Adapter) -> PreparedAdapter:
    """Return an adapter whose low-rank tensors of equal shape lie one behind the other, in the order of its sites.

    Every other tensor becomes contiguous. What several sites share, and what is the adapter's own, stays where it is.

    Args:
        adapter: the adapter that was prepared.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in adapter.parameters()}
    found = [t for change in prepared.changes.values() if isinstance(change, LowRank) for t in iter_tensors(change)]
    uses = collections.Counter(map(_locate, found))
    groups: dict[tuple[torch.dtype, torch.Size], list[Tensor]] = {}
    for tensor in found:
        stays = tensor.is_contiguous() and tensor.untyped_storage().data_ptr() in own
        if uses[_locate(tensor)] == 1 and tensor.numel() and tensor.device.type == "cpu" and not stays:
            groups.setdefault((tensor.dtype, tensor.shape), []).append(tensor)
    packed: dict[int, Tensor] = {}
    for (dtype, shape), group in groups.items():
        stack = torch.stack(group, out=StackShape(len(group), shape, dtype).new())
        packed |= {id(tensor): place for tensor, place in zip(group, stack.unbind(), strict=True)}
    return replace(prepared, changes={path: _exchange(change, packed) for path, change in prepared.changes.items()})


def _locate(tensor: Tensor) -> tuple[object, ...]:
    """Return what two tensors have in common that are one part of memory."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _exchange(change: Change, packed: dict[int, Tensor]) -> Change:
    """Return a change with other tensors in the place of some of its own, by identity; the others are contiguous."""
    assert not isinstance(change, SparseSum)  # the sum of several adapters
    form, parts = to_outputs(change)
    others = {name: packed[id(part)] if id(part) in packed else part.contiguous() for name, part in parts.items()}
    return from_outputs(form, others, None)
