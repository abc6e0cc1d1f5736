"""A choice of adapters as a file that ONNX Runtime itself reads: tensors for the program's slots.

ONNX Runtime's adapter files contain tensors by the names of a model's inputs. A slot's default is the base's content,
so such a file has only the slots that differ from the base. Two files at once could set one input twice, so a mixture
is written as a single file.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lorac.ir.graph.feeds import collect_slot_tensors
from lorac.ir.graph.graph import SlotInput
from lorac.ir.sites.site import BaseReader
from lorac.ir.slots.buffers import make_fused_buffers
from lorac.ir.slots.composition import ComposedWeights, fill_slots
from lorac.ir.slots.plans import SitePlan


def bound_tensors(
    inputs: Mapping[str, SlotInput], plans: Mapping[str, SitePlan], base: BaseReader, snapshot: ComposedWeights
) -> dict[str, Tensor]:
    """Return the tensors that a choice binds to slots, where these differ from the slots' defaults."""
    changed = {name: slot for name, slot in inputs.items() if snapshot.composed.keys() & {slot.site, *slot.members}}
    sites = {path: plans[path] for slot in changed.values() for path in (slot.site, *slot.members) if path in plans}
    bound = collect_slot_tensors(changed, sites, fill_slots(sites, snapshot, base))
    idle = collect_slot_tensors(changed, sites, fill_slots(sites, ComposedWeights(()), base))
    return {name: tensor for name, tensor in bound.items() if not torch.equal(tensor, idle[name])}


def merged_tensors(plans: Mapping[str, SitePlan], base: BaseReader, snapshot: ComposedWeights) -> dict[str, Tensor]:
    """Return the weights that a choice changes, bit by bit as an engine's memory has them."""
    changed: dict[str, Tensor] = {}
    for path in snapshot.composed.keys() & plans.keys():  # one site at a time: copies of all weights would be large
        buffers, memory = make_fused_buffers({path: plans[path]}, base)
        before = {name: tensor.clone() for name, tensor in memory.items()}
        for buffer in buffers.values():
            buffer.write(snapshot.composed[path].change)
        changed |= {name: tensor for name, tensor in memory.items() if not torch.equal(tensor, before[name])}
    return changed
