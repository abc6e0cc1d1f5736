"""ONNX Runtime artefacts: the emitted model with its weights beside it, and the base weights of planned sites."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort

from lorac.backends.onnxruntime.build import BASE
from lorac.backends.onnxruntime.emit import MODEL, WEIGHTS
from lorac.backends.onnxruntime.engine import OrtEngine
from lorac.backends.onnxruntime.options import Options
from lorac.backends.onnxruntime.session import new_session
from lorac.errors import ArtifactError, Unavailable
from lorac.ir.engine import BuildRequest
from lorac.ir.graph.signature import CallSignature
from lorac.ir.slots.site import SitePlan
from lorac.ir.store.plans import slot_from_json, slot_to_json
from lorac.ir.store.tensors import TensorFile, file_base

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def store(engine: OrtEngine, folder: Path, request: Callable[[], BuildRequest]) -> dict[str, Any]:
    """Copy the emitted model, its weights and the base weights."""
    for name in (MODEL, WEIGHTS, BASE):
        if (engine.folder / name).exists():  # a model without large weights has none beside it
            shutil.copyfile(engine.folder / name, folder / name)
    return {
        "signature": engine.signature.to_json(),
        "slots": [slot_to_json(slot) for slot in engine.slots.values()],
        "options": dataclasses.asdict(engine.options),
    }


def restore(
    stored: Mapping[str, Any], folder: Path, plans: Mapping[str, SitePlan], mode: str, device: Any
) -> OrtEngine:
    """A session over the model where it lies; its weights are mapped."""
    check_locations(folder / MODEL)
    options = Options(**stored["options"])
    if device is not None:
        options = dataclasses.replace(options, providers=_providers(str(device)))
    slots = map(slot_from_json, stored["slots"])
    return OrtEngine(
        session=new_session(folder / MODEL, options),
        signature=CallSignature.from_json(stored["signature"]),
        slots={slot.name: slot for slot in slots},
        plans=plans,
        base=file_base(TensorFile(base_file(folder))),
        mode=mode,
        folder=folder,
        options=options,
    )


def base_file(folder: Path) -> Path:
    """The file with the base weights."""
    return folder / BASE


def check_locations(path: Path) -> None:
    """The model names the files its weights lie in: none but the one beside it is read.

    Raises:
        ArtifactError: it names another.
    """
    for value in ir.load(path).graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and str(tensor.location) != WEIGHTS:
            raise ArtifactError(f"'{path}' keeps the weight '{value.name}' in '{tensor.location}', not in '{WEIGHTS}'")


def _providers(device: str) -> tuple[str, ...]:
    wanted = _PROVIDERS.get(device.partition(":")[0])
    if wanted is None or wanted not in ort.get_available_providers():
        raise Unavailable(
            f"this ONNX Runtime has no provider for device '{device}'",
            nearest=", ".join(ort.get_available_providers()),
            next_step="pip install 'lorac[cuda]'",
        )
    return tuple(dict.fromkeys((wanted, _PROVIDERS["cpu"])))
