"""The onnxruntime target: what it builds, stores and restores."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lorac.backends.onnx.files import BASE, names_of
from lorac.backends.onnxruntime.devices.providers import refuse_missing
from lorac.backends.onnxruntime.engine import GraphSession, OrtEngine
from lorac.backends.onnxruntime.options import Options
from lorac.backends.onnxruntime.quantised.base import as_computed
from lorac.backends.onnxruntime.quantised.codec import Codec
from lorac.backends.onnxruntime.session import new_session
from lorac.errors import Unavailable
from lorac.ir.engine import AnyDialect, Backend, BuildRequest, Engine, Files, Stored
from lorac.ir.graph.program import Program
from lorac.ir.graph.signature import CallSignature
from lorac.ir.host.sites import HALF, Site, SiteKind
from lorac.ir.slots.site import SitePlan
from lorac.ir.store.plans import slot_from_json, slot_to_json
from lorac.ir.store.tensors import TensorFile, file_base


class OnnxRuntime(Backend[Options]):
    """Emits ONNX, and runs it in sessions whose slot inputs are bound once per choice."""

    options = Options

    @functools.cached_property
    def dialect(self) -> AnyDialect:  # type: ignore[override]  # nobody sets it
        """What it can run; what else building takes is imported with it, and nothing of that to load an artefact."""
        from lorac.backends.onnxruntime.dialect import DIALECTS

        return DIALECTS["cpu"]

    def dialect_for(self, options: Options) -> AnyDialect:
        """What it can run where the options have it run."""
        from lorac.backends.onnxruntime.dialect import DIALECTS

        return DIALECTS[options.place.type]

    def placed(self, options: Options, device: torch.device | None) -> Options:
        """Options for a device that this machine has what it takes to run on."""
        if device is not None:
            options = dataclasses.replace(options, device=str(device))
        if options.cache and options.place.type != "cpu":
            raise Unavailable(
                f"programs that keep a cache do not run on {str(options.place)!r} yet: their buffers lie on the CPU",
                next_step="device='cpu' keeps a cache; cache=False runs on a GPU, and target='eager' generates there",
            )
        refuse_missing(options.chosen, options.place)
        return options

    def lacking(self, program: Program) -> tuple[str, ...]:
        """The ops that it does not claim."""
        from lorac.backends.onnx.emit import lacking
        from lorac.backends.onnxruntime.dialect import DIALECTS

        return lacking(program, DIALECTS["cpu"])

    def build(self, request: BuildRequest[Options]) -> OrtEngine:
        """An engine over sessions; the host is not kept."""
        from lorac.backends.onnxruntime.build import build

        return build(request)

    def held(self, sites: Mapping[str, Site], options: Options, mode: str) -> dict[str, Site]:
        """Layers and embeddings that are to be quantised say so. What is baked is merged in float first."""
        codec = options.codec
        if codec is None or mode == "baked":
            return dict(sites)
        return {
            path: dataclasses.replace(site, packed=codec.name) if _is_quantised(site, codec) else site
            for path, site in sites.items()
        }

    def store(self, engine: Engine, folder: Path, request: Callable[[], BuildRequest[Options]]) -> Stored:
        """Copy the emitted models, their weights and the base weights."""
        assert isinstance(engine, OrtEngine)
        for name, held in engine.files.items():
            held.copy_to(folder / name)
        return {
            "graphs": {name: _described(part) for name, part in engine.parts.items()},
            "options": dataclasses.asdict(engine.options),
        }

    def restore(
        self, stored: Stored, files: Files, plans: Mapping[str, SitePlan], mode: str, device: str | torch.device | None
    ) -> OrtEngine:
        """Sessions over the models as they are held; their weights are mapped."""
        given: Any = stored
        tensors = self.base_of(files)
        options = Options(**given["options"])
        if device is not None:
            # Providers that were asked for when it was saved are of the place it ran on then.
            own = options.providers if options.place.type == torch.device(device).type else None
            options = dataclasses.replace(options, providers=own, device=str(device))
        options = self.placed(options, None)
        _refuse_half(plans, options)
        return OrtEngine(
            parts={name: _part(name, files, entry, options) for name, entry in given["graphs"].items()},
            plans=plans,
            base=file_base({} if tensors is None else tensors),
            mode=mode,
            files={name: files[name] for name in names_of(given["graphs"]) if name in files},
            options=options,
        )

    def base_of(self, files: Files) -> Mapping[str, torch.Tensor] | None:
        """The base weights as products are taken with them, some of which the models hold; None of a baked program."""
        return as_computed(TensorFile(files[BASE], files)) if BASE in files else None


BACKEND = OnnxRuntime()


def _is_quantised(site: Site, codec: Codec) -> bool:
    """Whether a site is a layer whose weight a program holds quantised; a module's own product is a slot's."""
    if site.within is not None or site.dtype != torch.float32 or site.packed:
        return False
    columns = {SiteKind.LINEAR: site.in_features, SiteKind.EMBEDDING: site.out_features}.get(site.kind)
    return columns is not None and codec.why_not(columns) is None


def _described(part: GraphSession) -> dict[str, Any]:
    return {
        "signature": part.signature.to_json(),
        "slots": [slot_to_json(slot) for slot in part.slots.values()],
    }


def _part(graph: str, files: Files, stored: Mapping[str, Any], options: Options) -> GraphSession:
    slots = [slot_from_json(slot) for slot in stored["slots"]]
    return GraphSession(
        new_session(files, graph, options),
        CallSignature.from_json(stored["signature"]),
        {slot.name: slot for slot in slots},
    )


def _refuse_half(plans: Mapping[str, SitePlan], options: Options) -> None:
    """Raise ``Unavailable`` for a stored program in half precision on a device that does not compute in it."""
    dtypes = {str(plan.site.dtype).removeprefix("torch.") for plan in plans.values() if plan.site.dtype in HALF}
    if dtypes and options.place.type == "cpu":
        raise Unavailable(
            f"this program is in {', '.join(sorted(dtypes))}, in which ONNX Runtime does not compute on the CPU",
            next_step="load it with device='cuda', or compile it from the model with device='cpu'",
        )
