"""A choice of adapters as a file that ONNX Runtime itself reads, with the tensors of the program's slots.

ONNX Runtime's own adapter files hold tensors by the names of a model's inputs. The default of a slot's input is the
base's content, so such a file has only the slots that differ from the base. Two files at a time would give one input
two contents, so a mixture is a file of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
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
"""Version of the adapter and of the model; ONNX Runtime requires numbers, and compares them with nothing."""
_MAX_BYTES = (1 << 31) - (1 << 20)
"""The most bytes of tensors in a file: less than 2 GiB, descriptions included."""


def write_adapter_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as an ``.onnx_adapter``; equal tensors give equal bytes.

    Raises:
        Unavailable: the tensors are too large for such a file.
    """
    size = sum(tensor.nbytes for tensor in tensors.values())
    if size > _MAX_BYTES:
        raise Unavailable(
            f"'{path.name}' would have {size} bytes, and an .onnx_adapter holds less than 2 GiB",
            next_step="mode='live' binds factors instead of merged weights where the method has them",
        )
    arrays = {name: tensors[name].detach().contiguous().numpy() for name in sorted(tensors)}
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(_VERSION)
    adapter.set_model_version(_VERSION)
    adapter.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    adapter.export_adapter(str(path))


def bound_tensors(
    inputs: Mapping[str, SlotInput], plans: Mapping[str, SitePlan], base: BaseReader, snapshot: ComposedWeights
) -> dict[str, Tensor]:
    """Return the tensors that a choice binds to slots, where they differ from the slots' defaults."""
    changed = {name: slot for name, slot in inputs.items() if snapshot.composed.keys() & {slot.site, *slot.members}}
    sites = {path: plans[path] for slot in changed.values() for path in (slot.site, *slot.members) if path in plans}
    bound = collect_slot_tensors(changed, sites, fill_slots(sites, snapshot, base))
    idle = collect_slot_tensors(changed, sites, fill_slots(sites, ComposedWeights(()), base))
    return {name: tensor for name, tensor in bound.items() if not torch.equal(tensor, idle[name])}


def merged_tensors(plans: Mapping[str, SitePlan], base: BaseReader, snapshot: ComposedWeights) -> dict[str, Tensor]:
    """Return the weights that a choice changes, equal to the bit to those in an engine's memory."""
    changed: dict[str, Tensor] = {}
    for path in snapshot.composed.keys() & plans.keys():  # one site at a time: copies of all weights would be large
        buffers, memory = make_fused_buffers({path: plans[path]}, base)
        before = {name: tensor.clone() for name, tensor in memory.items()}
        for buffer in buffers.values():
            buffer.write(snapshot.composed[path].change)
        changed |= {name: tensor for name, tensor in memory.items() if not torch.equal(tensor, before[name])}
    return changed
