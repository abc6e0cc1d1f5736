"""Eager artefacts: the captured program as nodes and tensors, since a module cannot be stored without pickle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim

from lorac.backends.eager.program import ProgramEngine
from lorac.errors import Unavailable
from lorac.ir.engine import BuildRequest
from lorac.ir.graph.graph import Graph, Level, SlotInput
from lorac.ir.graph.signature import CallSignature
from lorac.ir.host.sites import Site
from lorac.ir.lowered import lowered
from lorac.ir.slots.site import SitePlan
from lorac.ir.store.plans import slot_from_json, slot_to_json
from lorac.ir.store.program import StoredProgram, tensors_of, to_json
from lorac.ir.store.tensors import TensorFile, base_tensors, file_base

_PROGRAM, _WEIGHTS = "program.json", "weights.safetensors"


def store(engine: Any, folder: Path, request: Callable[[], BuildRequest]) -> dict[str, Any]:
    """Write the program and its weights, the base weights of planned sites among them."""
    if isinstance(engine, ProgramEngine):
        for name in (_PROGRAM, _WEIGHTS):
            shutil.copyfile(engine.folder / name, folder / name)
        return _described(engine.signature, engine.slots)
    made = request()
    graph, signature = lowered(made, made.options.aux)
    text = json.dumps(to_json(graph.exported), separators=(",", ":"), allow_nan=False)
    (folder / _PROGRAM).write_text(text, encoding="utf-8")
    base = base_tensors(made.model, {path: plan.site for path, plan in made.plans.items()})
    TensorFile.write(folder / _WEIGHTS, {**base, **tensors_of(graph.exported)})
    return _described(signature, graph.slots)


def restore(
    stored: Mapping[str, Any], folder: Path, plans: Mapping[str, SitePlan], mode: str, device: Any
) -> ProgramEngine:
    """An engine that runs the stored program; it answers, and does not train."""
    place = None if device is None else torch.device(device)
    if place is not None and place.type != "cpu" and mode == "fused":
        raise Unavailable(
            "a fused eager artefact runs on the CPU only",
            next_step="save it in live mode, or load it with target='onnxruntime'",
        )
    file = TensorFile(base_file(folder))
    return ProgramEngine(
        program=_program(folder, file).to(place),
        signature=CallSignature.from_json(stored["signature"]),
        slots=_slots(stored),
        plans=plans,
        base=file_base(file),
        mode=mode,
        folder=folder,
        device=place,
    )


def base_file(folder: Path) -> Path:
    """The file with the base weights."""
    return folder / _WEIGHTS


def relowered(
    stored: Mapping[str, Any], folder: Path, sites: Mapping[str, Site], plans: Mapping[str, SitePlan]
) -> tuple[Graph, CallSignature]:
    """The stored program as a graph again, at level expanded, for another target to build from."""
    program = _program(folder, TensorFile(base_file(folder)))
    shapes = {name: dict.fromkeys(axes, Dim.AUTO) for name, axes in program.dynamic.items()}
    with torch.no_grad():
        exported = torch.export.export(program, (), program.examples, dynamic_shapes=shapes)
    graph = Graph("main", exported, sites, plans, level=Level.EXPANDED, slots=dict(_slots(stored)))
    signature = CallSignature.from_json(stored["signature"])
    graph.extra_outputs = list(signature.extra)
    return graph, signature


def _described(signature: CallSignature, slots: Mapping[str, SlotInput]) -> dict[str, Any]:
    return {"signature": signature.to_json(), "slots": [slot_to_json(slot) for slot in slots.values()]}


def _slots(stored: Mapping[str, Any]) -> dict[str, SlotInput]:
    return {slot.name: slot for slot in map(slot_from_json, stored["slots"])}


def _program(folder: Path, file: TensorFile) -> StoredProgram:
    return StoredProgram(json.loads((folder / _PROGRAM).read_text(encoding="utf-8")), file)
