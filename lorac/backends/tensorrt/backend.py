"""The tensorrt target: what it builds, stores and restores."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lorac.backends.onnx.files import BASE, name_of
from lorac.backends.tensorrt import library
from lorac.backends.tensorrt.capabilities import local
from lorac.backends.tensorrt.device.requirements import (
    place_of,
    refuse_capability,
    refuse_other_library,
    tell_lacking,
)
from lorac.backends.tensorrt.engine import PLAN, Plan, TrtEngine, files_of
from lorac.backends.tensorrt.options import Options
from lorac.backends.tensorrt.profiles import Range
from lorac.errors import OptionError
from lorac.ir.engine import AnyDialect, Backend, BuildRequest, Engine, Files, Stored
from lorac.ir.graph.program import Program
from lorac.ir.graph.signature import CallSignature
from lorac.ir.slots.site import SitePlan
from lorac.ir.store.plans import slot_from_json, slot_to_json
from lorac.ir.store.tensors import TensorFile, file_base


class TensorRT(Backend[Options]):
    """Emits ONNX, and has it built into plans whose slot inputs are tensors in the GPU's memory."""

    options = Options

    @functools.cached_property
    def dialect(self) -> AnyDialect:  # type: ignore[override]  # nobody sets it
        """What it can run; what else building takes is imported with it, and nothing of that to load an artefact."""
        from lorac.backends.tensorrt.dialect import DIALECT

        return DIALECT

    def placed(self, options: Options, device: torch.device | None) -> Options:
        """Options for a GPU, whether or not there is one here: plans are built without."""
        if device is None:
            return options
        if device.type != "cuda":
            raise OptionError(
                f"target 'tensorrt' runs on NVIDIA GPUs, and not on device '{device}'",
                nearest="cuda",
                next_step="leave device= out; target='onnxruntime' and target='eager' run on the CPU",
            )
        return dataclasses.replace(options, device=str(device))

    def lacking(self, program: Program) -> tuple[str, ...]:
        """The ops that it does not claim."""
        from lorac.backends.onnx.emit import lacking
        from lorac.backends.tensorrt.dialect import DIALECT

        return lacking(program, DIALECT)

    def build(self, request: BuildRequest[Options]) -> TrtEngine:
        """An engine over plans; the host is not kept."""
        from lorac.backends.tensorrt.build import build

        return build(request)

    def store(self, engine: Engine, folder: Path, request: Callable[[], BuildRequest[Options]]) -> Stored:
        """Copy the emitted models, their plans and the base weights."""
        assert isinstance(engine, TrtEngine)
        for name, held in engine.files.items():
            held.copy_to(folder / name)
        return {
            "graphs": {name: _described(part) for name, part in engine.parts.items()},
            "options": dataclasses.asdict(engine.options),
        }

    def restore(
        self, stored: Stored, files: Files, plans: Mapping[str, SitePlan], mode: str, device: str | torch.device | None
    ) -> TrtEngine:
        """An engine over the plans as they are held; the first call loads them.

        Raises:
            ArtifactError: they are another library's, or another release's.
            Unavailable: they are for other GPUs, or the device is none.
        """
        given: Any = stored
        options = Options(**given["options"])
        options = options if device is None else dataclasses.replace(options, device=str(device))
        parts = {name: _part(name, files, entry) for name, entry in given["graphs"].items()}
        for part in parts.values():
            _refuse_other(part)
        tensors = self.base_of(files)
        engine = TrtEngine(
            parts=parts,
            plans=plans,
            base=file_base({} if tensors is None else tensors),
            mode=mode,
            files={name: files[name] for name in files_of(given["graphs"]) if name in files},
            options=options,
            device=place_of(options.device),
        )
        tell_lacking()
        return engine

    def base_of(self, files: Files) -> Mapping[str, torch.Tensor] | None:
        """The base weights, some of which the models hold; None of a baked program."""
        return TensorFile(files[BASE], files) if BASE in files else None


BACKEND = TensorRT()
library.trt()  # a missing one is told where the target is asked for, and not where it first builds


def _described(part: Plan) -> dict[str, Any]:
    return {
        "signature": part.signature.to_json(),
        "slots": [slot_to_json(slot) for slot in part.slots.values()],
        "ranges": {name: [dataclasses.astuple(axis) for axis in axes] for name, axes in part.ranges.items()},
        "dtypes": {name: str(dtype).removeprefix("torch.") for name, dtype in part.dtypes.items()},
        "capabilities": list(part.capabilities),
        "made_by": part.made_by,
    }


def _part(graph: str, files: Files, stored: Mapping[str, Any]) -> Plan:
    slots = [slot_from_json(slot) for slot in stored["slots"]]
    return Plan(
        file=files[name_of(graph, PLAN)],
        signature=CallSignature.from_json(stored["signature"]),
        slots={slot.name: slot for slot in slots},
        ranges={name: tuple(Range(*axis) for axis in axes) for name, axes in stored["ranges"].items()},
        dtypes={name: getattr(torch, dtype) for name, dtype in stored["dtypes"].items()},
        capabilities=tuple(stored["capabilities"]),
        made_by=stored["made_by"],
    )


def _refuse_other(part: Plan) -> None:
    """Refuse a plan of another library's or release's, and where there is a GPU, one that is for others."""
    refuse_other_library(part.made_by)
    here = local()
    if here is not None:
        refuse_capability(here, part.capabilities, torch.cuda.get_device_name())
