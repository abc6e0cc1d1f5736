"""A choice of adapters as a file that ONNX Runtime itself reads: what the choice puts into the program's slots.

ONNX Runtime's own adapter files hold tensors by the names of a model's inputs. A program's slots are inputs that hold
the base's content unless another is given, so such a file has what differs from it and nothing else; several of them at
a time are several contents for one input, which is why a mixture is a file of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import onnxruntime as ort
import torch

from lorac.errors import Unavailable
from lorac.ir.graph.feeds import collect_slot_tensors
from lorac.ir.graph.graph import SlotInput
from lorac.ir.sites import BaseReader
from lorac.ir.slots.buffers import make_fused_buffers
from lorac.ir.slots.composition import ComposedWeights, fill_slots
from lorac.ir.slots.plans import SitePlan

Tensor = torch.Tensor
_VERSION = 1
"""Of the adapter and of the model: ONNX Runtime asks for numbers, and compares them with nothing."""
_MAX_BYTES = (1 << 31) - (1 << 20)
"""Bytes that a file may hold: less than 2 GiB, descriptions included."""


def write_adapter_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as an ``.onnx_adapter``; equal tensors give equal bytes.

    Raises:
        Unavailable: they are more than such a file can hold.
    """
    size = sum(tensor.nbytes for tensor in tensors.values())
    if size > _MAX_BYTES:
        raise Unavailable(
            f"'{path.name}' would have {size} bytes, and an .onnx_adapter holds less than 2 GiB",
            next_step="mode='live' binds factors instead of merged weights where the method has them",
        )
    held = {name: tensors[name].detach().contiguous() for name in sorted(tensors)}
    made = ort.AdapterFormat()
    made.set_adapter_version(_VERSION)
    made.set_model_version(_VERSION)
    made.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(tensor.numpy()) for name, tensor in held.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    made.export_adapter(str(path))


def bound_tensors(
    inputs: Mapping[str, SlotInput], plans: Mapping[str, SitePlan], base: BaseReader, snapshot: ComposedWeights
) -> dict[str, Tensor]:
    """What a snapshot binds to slots, where it is not what they hold by themselves.

    Args:
        inputs: the slot inputs by name.
        plans: slots of every site.
        base: reads base weights.
        snapshot: the choice.
    """
    own = {name: slot for name, slot in inputs.items() if snapshot.composed.keys() & {slot.site, *slot.members}}
    sites = {path: plans[path] for slot in own.values() for path in (slot.site, *slot.members) if path in plans}
    bound = collect_slot_tensors(own, sites, fill_slots(sites, snapshot, base))
    idle = collect_slot_tensors(own, sites, fill_slots(sites, ComposedWeights(()), base))
    return {name: tensor for name, tensor in bound.items() if not torch.equal(tensor, idle[name])}


def merged_tensors(plans: Mapping[str, SitePlan], base: BaseReader, snapshot: ComposedWeights) -> dict[str, Tensor]:
    """What a snapshot writes into weights, where it is not the base's: to the bit what an engine's memory holds."""
    return dict(
        item
        for path in snapshot.composed
        if path in plans
        for item in _merged_site_tensors(plans[path], base, snapshot)
    )


def _merged_site_tensors(plan: SitePlan, base: BaseReader, snapshot: ComposedWeights) -> Iterator[tuple[str, Tensor]]:
    path = plan.site.path
    buffers, memory = make_fused_buffers({path: plan}, base)
    before = {name: tensor.clone() for name, tensor in memory.items()}
    for buffer in buffers.values():
        buffer.write(snapshot.composed[path].change)
    yield from ((name, tensor) for name, tensor in memory.items() if not torch.equal(tensor, before[name]))
