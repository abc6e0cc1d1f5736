"""The onnxruntime target: what it builds, stores and restores."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lorac.backends.onnx.model_files import BASE_FILE, list_program_files
from lorac.backends.onnxruntime.devices.providers import check_providers
from lorac.backends.onnxruntime.engine import GraphSession, OrtEngine
from lorac.backends.onnxruntime.inference_session import create_session
from lorac.backends.onnxruntime.options import OnnxRuntimeOptions
from lorac.backends.onnxruntime.quantised.base_weights import dequantised_weights
from lorac.backends.onnxruntime.quantised.codec import Codec
from lorac.errors import Unavailable
from lorac.frontend.quantised_weights import iter_quantised_origins
from lorac.ir.graph.program import Program
from lorac.ir.interface import Interface
from lorac.ir.sites import HALF_PRECISION, Site, SiteKind
from lorac.ir.slots.plans import SitePlan
from lorac.storage.plans import slot_from_json, slot_to_json
from lorac.storage.tensor_file import TensorFile, make_file_base_reader
from lorac.target.backend import Backend, BuildRequest, StoredState
from lorac.target.dialect import AnyDialect
from lorac.target.engine import Engine, ProgramFiles


class OnnxRuntime(Backend[OnnxRuntimeOptions]):
    """Emits ONNX, and runs it in sessions whose slot inputs are bound once per choice."""

    options = OnnxRuntimeOptions

    @functools.cached_property
    def dialect(self) -> AnyDialect:  # type: ignore[override]  # nobody sets it
        """What it can run; what else building takes is imported with it, and nothing of that to load an artefact."""
        from lorac.backends.onnxruntime.dialect import DIALECTS

        return DIALECTS["cpu"]

    def dialect_for(self, options: OnnxRuntimeOptions) -> AnyDialect:
        """What it can run where the options have it run."""
        from lorac.backends.onnxruntime.dialect import DIALECTS

        return DIALECTS[options.place.type]

    def place_options(self, options: OnnxRuntimeOptions, device: torch.device | None) -> OnnxRuntimeOptions:
        """Options for a device that this machine has what it takes to run on."""
        if device is not None:
            options = dataclasses.replace(options, device=str(device))
        if options.cache and options.place.type != "cpu":
            raise Unavailable(
                f"programs that keep a cache do not run on {str(options.place)!r} yet: their buffers lie on the CPU",
                next_step="device='cpu' keeps a cache; cache=False runs on a GPU, and target='eager' generates there",
            )
        check_providers(options.chosen, options.place)
        return options

    def list_unsupported(self, program: Program) -> tuple[str, ...]:
        """The ops that it does not claim."""
        from lorac.backends.onnx.emit import list_unsupported_ops
        from lorac.backends.onnxruntime.dialect import DIALECTS

        return list_unsupported_ops(program, DIALECTS["cpu"])

    def check(self, request: BuildRequest[OnnxRuntimeOptions]) -> None:
        """Also refuse options about quantised weights if nothing is quantised."""
        Backend.check(self, request)
        if not any(True for _ in iter_quantised_origins(request.model)):
            request.options.refuse_idle()

    def build(self, request: BuildRequest[OnnxRuntimeOptions]) -> OrtEngine:
        """An engine over sessions; the host is not kept."""
        from lorac.backends.onnxruntime.build import build

        return build(request)

    def mark_quantised(self, sites: Mapping[str, Site], options: OnnxRuntimeOptions, mode: str) -> dict[str, Site]:
        """Layers and embeddings that are to be quantised say so. What is baked is merged in float first."""
        codec = options.codec
        if codec is None or mode == "baked":
            return dict(sites)
        return {
            path: dataclasses.replace(site, packed=codec.name) if _is_quantised(site, codec) else site
            for path, site in sites.items()
        }

    def store(self, engine: Engine, folder: Path, request: BuildRequest[OnnxRuntimeOptions] | None) -> StoredState:
        """Copy the emitted models, their weights and the base weights."""
        assert isinstance(engine, OrtEngine)
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
    ) -> OrtEngine:
        """Sessions over the models as they are held; their weights are mapped."""
        given: Any = stored
        tensors = self.read_base_weights(files)
        options = OnnxRuntimeOptions(**given["options"])
        if device is not None:
            # Providers that were asked for when it was saved are of the place it ran on then.
            own = options.providers if options.place.type == torch.device(device).type else None
            options = dataclasses.replace(options, providers=own, device=str(device))
        options = self.place_options(options, None)
        _refuse_half(plans, options)
        return OrtEngine(
            parts={name: _graph_from_json(name, files, entry, options) for name, entry in given["graphs"].items()},
            plans=plans,
            base=make_file_base_reader({} if tensors is None else tensors),
            mode=mode,
            files={name: files[name] for name in list_program_files(given["graphs"]) if name in files},
            options=options,
        )

    def read_base_weights(self, files: ProgramFiles) -> Mapping[str, torch.Tensor] | None:
        """The base weights as products are taken with them, some of which the models hold; None of a baked program."""
        return dequantised_weights(TensorFile(files[BASE_FILE], files)) if BASE_FILE in files else None


BACKEND = OnnxRuntime()


def _is_quantised(site: Site, codec: Codec) -> bool:
    """Whether a site is a layer whose weight a program holds quantised; a module's own product is a slot's."""
    if site.within is not None or site.dtype != torch.float32 or site.packed:
        return False
    columns = {SiteKind.LINEAR: site.in_features, SiteKind.EMBEDDING: site.out_features}.get(site.kind)
    return columns is not None and codec.why_not(columns) is None


def _graph_to_json(part: GraphSession) -> dict[str, Any]:
    return {
        "signature": part.signature.to_json(),
        "slots": [slot_to_json(slot) for slot in part.slots.values()],
    }


def _graph_from_json(
    graph: str, files: ProgramFiles, stored: Mapping[str, Any], options: OnnxRuntimeOptions
) -> GraphSession:
    slots = [slot_from_json(slot) for slot in stored["slots"]]
    return GraphSession(
        create_session(files, graph, options),
        Interface.from_json(stored["signature"]),
        {slot.name: slot for slot in slots},
    )


def _refuse_half(plans: Mapping[str, SitePlan], options: OnnxRuntimeOptions) -> None:
    """Raise ``Unavailable`` for a stored program in half precision on a device that does not compute in it."""
    dtypes = {
        str(plan.site.dtype).removeprefix("torch.") for plan in plans.values() if plan.site.dtype in HALF_PRECISION
    }
    if dtypes and options.place.type == "cpu":
        raise Unavailable(
            f"this program is in {', '.join(sorted(dtypes))}, in which ONNX Runtime does not compute on the CPU",
            next_step="load it with device='cuda', or compile it from the model with device='cpu'",
        )
