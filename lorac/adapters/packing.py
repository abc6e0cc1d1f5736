"""Prepared adapters in a few blocks of memory, as programs with places for rows take them."""

import collections
from dataclasses import replace

import torch
from torch import Tensor

from lorac.ir.algebra.changes import LowRank, list_tensors, map_tensors
from lorac.ir.slots.plans import PreparedAdapter
from lorac.ir.slots.stacks import StackShape
from lorac.variants.adapter import Adapter


def pack_adapter(prepared: PreparedAdapter, adapter: Adapter) -> PreparedAdapter:
    """Return an adapter whose low-rank tensors of equal shape lie one behind the other, in the order of its sites.

    Every other tensor becomes contiguous. Tensors that several sites share, and the adapter's own, stay in place.

    Args:
        adapter: the adapter that was prepared.
    """
    found = [t for change in prepared.changes.values() if isinstance(change, LowRank) for t in list_tensors(change)]
    places = [(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for tensor in found]
    uses = collections.Counter(places)
    contiguous = [tensor.is_contiguous() for tensor in found]
    own = {tensor.untyped_storage().data_ptr() for tensor in adapter.parameters()} if any(contiguous) else set()
    groups: dict[tuple[torch.dtype, torch.Size], list[Tensor]] = collections.defaultdict(list)
    for tensor, place, is_contiguous in zip(found, places, contiguous, strict=True):
        stays = is_contiguous and tensor.untyped_storage().data_ptr() in own
        if uses[place] == 1 and tensor.is_cpu and not stays and 0 not in tensor.shape:
            groups[tensor.dtype, tensor.shape].append(tensor)
    packed: dict[int, Tensor] = {}
    for (dtype, shape), group in groups.items():
        stack = torch.stack(group, out=StackShape(len(group), shape, dtype).new())
        packed |= zip(map(id, group), stack.unbind(), strict=True)

    def exchange(tensor: Tensor) -> Tensor:
        if id(tensor) in packed:
            return packed[id(tensor)]
        return (tensor.detach() if tensor.requires_grad else tensor).contiguous()

    return replace(prepared, changes={path: map_tensors(exchange, one) for path, one in prepared.changes.items()})
