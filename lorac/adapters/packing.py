"""Prepared adapters in a few blocks of memory, as programs with places for rows take them."""

import collections
from dataclasses import replace

import torch
from torch import Tensor

from lorac.ir.algebra.changes import LowRank, iter_tensors, map_tensors
from lorac.ir.slots.plans import PreparedAdapter
from lorac.ir.slots.stacks import StackShape
from lorac.variants.adapter import Adapter


def pack_adapter(prepared: PreparedAdapter, adapter: Adapter) -> PreparedAdapter:
    """Return an adapter whose low-rank tensors of equal shape lie one behind the other, in the order of its sites.

    Every other tensor becomes contiguous. Tensors that several sites share, and the adapter's own, stay in place.

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

    def place(tensor: Tensor) -> Tensor:
        return packed[id(tensor)] if id(tensor) in packed else tensor.contiguous()

    changes = {path: map_tensors(place, change) for path, change in prepared.changes.items()}
    return replace(prepared, changes=changes)


def _locate(tensor: Tensor) -> tuple[object, ...]:
    """Return a key that is equal for two tensors that are one part of memory."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
