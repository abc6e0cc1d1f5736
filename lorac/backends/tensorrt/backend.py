"""The tensorrt target: what it builds, stores and restores."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lorac.backends.onnx.model_files import BASE_FILE, graph_file
from lorac.backends.tensorrt import library
from lorac.backends.tensorrt.capabilities import local_capability
from lorac.backends.tensorrt.device.requirements import (
    check_capability,
    check_library,
    plan_device,
    warn_missing_requirement,
)
from lorac.backends.tensorrt.engine import PLAN, GraphPlan, TrtEngine, plan_files
from lorac.backends.tensorrt.options import TensorRTOptions
from lorac.backends.tensorrt.profiles import SizeRange
from lorac.errors import OptionError
from lorac.ir.graph.program import Program
from lorac.ir.interface import Interface
from lorac.ir.slots.plans import SitePlan
from lorac.storage.plans import slot_from_json, slot_to_json
from lorac.storage.tensor_file import TensorFile, make_file_base_reader
from lorac.target.backend import Backend, BuildRequest, StoredState
from lorac.target.dialect import AnyDialect
from lorac.target.engine import Engine, ProgramFiles


class TensorRT(Backend[TensorRTOptions]):
    """Emits ONNX, and has it built into plans whose slot inputs are tensors in the GPU's memory."""

    options = TensorRTOptions

    @functools.cached_property
    def dialect(self) -> AnyDialect:  # type: ignore[override]  # nobody sets it
        """What it can run; what else building takes is imported with it, and nothing of that to load an artefact."""
        from lorac.backends.tensorrt.dialect import DIALECT

        return DIALECT

    def place_options(self, options: TensorRTOptions, device: torch.device | None) -> TensorRTOptions:
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

    def list_unsupported(self, program: Program) -> tuple[str, ...]:
        """The ops that it does not claim."""
        from lorac.backends.onnx.emit import list_unsupported_ops
        from lorac.backends.tensorrt.dialect import DIALECT

        return list_unsupported_ops(program, DIALECT)

    def check(self, request: BuildRequest[TensorRTOptions]) -> None:
        """Also refuse ``refit=`` if there is nothing to refit."""
        from lorac.backends.tensorrt.build import check_refit

        Backend.check(self, request)
        check_refit(request)

    def build(self, request: BuildRequest[TensorRTOptions]) -> TrtEngine:
        """An engine over plans; the host is not kept."""
        from lorac.backends.tensorrt.build import build

        return build(request)

    def store(self, engine: Engine, folder: Path, request: BuildRequest[TensorRTOptions] | None) -> StoredState:
        """Copy the emitted models, their plans and the base weights."""
        assert isinstance(engine, TrtEngine)
        for name, held in engine.files.items():
            held.copy_to(folder / name)
        return {
            "graphs": {name: _graph_to_json(part) for name, part in engine.parts.items()},
            "options": dataclasses.asdict(engine.options),
        }

    def restore(
        self,
        stored: StoredState,
        files: ProgramFiles,
        plans: Mapping[str, SitePlan],
        mode: str,
        device: str | torch.device | None,
    ) -> TrtEngine:
        """An engine over the plans as they are held; the first call loads them.

        Raises:
            ArtifactError: they are another library's, or another release's.
            Unavailable: they are for other GPUs, or the device is none.
        """
        given: Any = stored
        options = TensorRTOptions(**given["options"])
        options = options if device is None else dataclasses.replace(options, device=str(device))
        parts = {name: _graph_from_json(name, files, entry) for name, entry in given["graphs"].items()}
        for part in parts.values():
            _check_plan_origin(part)
        tensors = self.read_base_weights(files)
        engine = TrtEngine(
            parts=parts,
            plans=plans,
            base=make_file_base_reader({} if tensors is None else tensors),
            mode=mode,
            files={name: files[name] for name in plan_files(given["graphs"]) if name in files},
            options=options,
            device=plan_device(options.device),
        )
        warn_missing_requirement()
        return engine

    def read_base_weights(self, files: ProgramFiles) -> Mapping[str, torch.Tensor] | None:
        """The base weights, some of which the models hold; None of a baked program."""
        return TensorFile(files[BASE_FILE], files) if BASE_FILE in files else None


BACKEND = TensorRT()
library.trt()  # a missing one is told where the target is asked for, and not where it first builds


def _graph_to_json(part: GraphPlan) -> dict[str, Any]:
    return {
        "signature": part.signature.to_json(),
        "slots": [slot_to_json(slot) for slot in part.slots.values()],
        "ranges": {name: [dataclasses.astuple(axis) for axis in axes] for name, axes in part.ranges.items()},
        "dtypes": {name: str(dtype).removeprefix("torch.") for name, dtype in part.dtypes.items()},
        "capabilities": list(part.capabilities),
        "made_by": part.made_by,
    }


def _graph_from_json(graph: str, files: ProgramFiles, stored: Mapping[str, Any]) -> GraphPlan:
    slots = [slot_from_json(slot) for slot in stored["slots"]]
    return GraphPlan(
        file=files[graph_file(graph, PLAN)],
        signature=Interface.from_json(stored["signature"]),
        slots={slot.name: slot for slot in slots},
        ranges={name: tuple(SizeRange(*axis) for axis in axes) for name, axes in stored["ranges"].items()},
        dtypes={name: getattr(torch, dtype) for name, dtype in stored["dtypes"].items()},
        capabilities=tuple(stored["capabilities"]),
        made_by=stored["made_by"],
    )


def _check_plan_origin(part: GraphPlan) -> None:
    """Refuse a plan of another library's or release's, and where there is a GPU, one that is for others."""
    check_library(part.made_by)
    here = local_capability()
    if here is not None:
        check_capability(here, part.capabilities, torch.cuda.get_device_name())
