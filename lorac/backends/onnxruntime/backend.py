"""The onnxruntime target: ONNX files that sessions run, with slot inputs bound once per choice of adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from lorac.argument_types import JsonMapping
from lorac.backends.onnx.engine import AnyOnnxEngine
from lorac.backends.onnx.model_files import SlotStorage
from lorac.backends.onnx.quantised.backend import QuantisingBackend, quantisation_reports
from lorac.backends.onnx.quantised.codec import FLOAT32_LEVEL
from lorac.backends.onnxruntime.devices.providers import check_providers
from lorac.backends.onnxruntime.engine import GraphSession, OrtEngine
from lorac.backends.onnxruntime.inference_session import create_session
from lorac.backends.onnxruntime.options import OnnxRuntimeOptions
from lorac.errors import Unavailable
from lorac.ir.calls.interface import Interface
from lorac.ir.graph.graph import SlotInput
from lorac.ir.sites.site import HALF_PRECISION
from lorac.ir.slots.plans import SitePlan
from lorac.target.backend import BuildRequest
from lorac.target.engine import ProgramFiles

if TYPE_CHECKING:
    from lorac.backends.onnx.emitted_program import EmittedProgram
    from lorac.backends.onnx.passes import OnnxDialect

    Emitted = EmittedProgram[OnnxRuntimeOptions]


class OnnxRuntime(QuantisingBackend[OnnxRuntimeOptions, GraphSession]):
    """The target that emits ONNX and runs it in sessions; methods import modules that only building needs."""

    options = OnnxRuntimeOptions
    engine = OrtEngine

    def dialect_for(self, options: OnnxRuntimeOptions) -> OnnxDialect:
        from lorac.backends.onnxruntime.dialect import DIALECTS

        dialect = DIALECTS[options.place.type]
        return dataclasses.replace(dialect, why_branches_shared="") if options.branch_rows else dialect

    def place_options(self, options: OnnxRuntimeOptions, device: torch.device | None) -> OnnxRuntimeOptions:
        """Return the options for a device; check that this machine meets the device's requirements."""
        if device is not None:
            options = dataclasses.replace(options, device=str(device))
        if options.cache and options.place.type != "cpu":
            raise Unavailable(
                f"programs that keep a cache do not run on {str(options.place)!r} yet: their buffers lie on the CPU",
                next_step="give device='cpu' or cache=False, or generate on the GPU with target='eager'",
            )
        check_providers(options.chosen, options.place)
        return options

    def slot_storage(self, request: BuildRequest[OnnxRuntimeOptions]) -> SlotStorage:
        """Return the place of slots' contents: in the model, which then runs alone, or in a file for any runtime."""
        inputs = SlotStorage.FILE if request.options.portable else SlotStorage.DEFAULTS
        return SlotStorage.CONSTANTS if request.mode == "baked" else inputs

    def load_graph(
        self,
        name: str,
        files: ProgramFiles,
        interface: Interface,
        slots: Mapping[str, SlotInput],
        stored: JsonMapping,
        options: OnnxRuntimeOptions,
    ) -> GraphSession:
        return GraphSession(create_session(files, name, options), interface, slots)

    def test(self, engine: AnyOnnxEngine, emitted: Emitted) -> None:
        """Test the engine with products whose inputs are not rounded to eight bits.

        That rounding changes the outputs of a deep model, and would hide a wrong slot.
        """
        reports, options = quantisation_reports(emitted), emitted.request.options
        if options.product_level > FLOAT32_LEVEL and any(report.quantised for report in reports.values()):
            graphs = {
                name: GraphSession(create_session(engine.files, name, options, rounds=False), g.interface, g.slots)
                for name, g in engine.graphs.items()
            }
            engine = OrtEngine(dataclasses.replace(engine.program, graphs=graphs))
        super().test(engine, emitted)

    def restore_options(
        self, stored: JsonMapping, plans: Mapping[str, SitePlan], device: str | torch.device | None
    ) -> OnnxRuntimeOptions:
        """Return the options of an artifact for a device; check that this machine can run it there."""
        options = OnnxRuntimeOptions(**stored)
        if device is not None:
            # The artifact's providers belong to the device on which it was saved.
            providers = options.providers if options.place.type == torch.device(device).type else None
            options = dataclasses.replace(options, providers=providers, device=str(device))
        options = self.place_options(options, None)
        dtypes = {plan.site.dtype for plan in plans.values()} & set(HALF_PRECISION)
        if dtypes and options.place.type == "cpu":
            names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise Unavailable(
                f"this program computes in {names}, which ONNX Runtime cannot do on the CPU",
                next_step="load it with device='cuda', or compile it from the model with device='cpu'",
            )
        return options


BACKEND = OnnxRuntime()
