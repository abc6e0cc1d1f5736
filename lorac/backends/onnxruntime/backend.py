"""The onnxruntime target: ONNX files run by sessions whose slot inputs are bound once per choice of adapters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from lorac.argument_types import JsonMapping
from lorac.backends.onnx.base_backend import OnnxBackend
from lorac.backends.onnx.engine import AnyOnnxEngine
from lorac.backends.onnx.model_files import BASE_FILE, SlotStorage
from lorac.backends.onnxruntime.devices.providers import check_providers
from lorac.backends.onnxruntime.engine import GraphSession, OrtEngine
from lorac.backends.onnxruntime.inference_session import create_session
from lorac.backends.onnxruntime.options import FLOAT32_LEVEL, OnnxRuntimeOptions
from lorac.backends.onnxruntime.quantised.algorithms import GPTQ
from lorac.backends.onnxruntime.quantised.base_weights import dequantised_weights
from lorac.backends.onnxruntime.quantised.codec import Codec
from lorac.errors import OptionError, Unavailable, warn
from lorac.ir.calls.interface import Interface
from lorac.ir.graph.graph import SlotInput
from lorac.ir.sites.site import HALF_PRECISION, Site, SiteKind
from lorac.ir.slots.plans import SitePlan
from lorac.storage.tensor_file import TensorFile
from lorac.target.backend import BuildRequest
from lorac.target.engine import ProgramFiles

if TYPE_CHECKING:
    from lorac.backends.onnx.emitted_program import EmittedProgram
    from lorac.backends.onnx.passes import OnnxDialect, OnnxPass
    from lorac.backends.onnxruntime.quantised.products import PrequantisedMatrix
    from lorac.backends.onnxruntime.quantised.quantisation_report import QuantisationReport

    Emitted = EmittedProgram[OnnxRuntimeOptions]

_QUANTISED = "quantised"
"""Stands for a number of bits, which is chosen when the program is written."""


class OnnxRuntime(OnnxBackend[OnnxRuntimeOptions, GraphSession]):
    """Emits ONNX, and runs it in sessions. Its methods import the modules that only building needs."""

    options = OnnxRuntimeOptions
    engine = OrtEngine

    def dialect_for(self, options: OnnxRuntimeOptions) -> OnnxDialect:
        from lorac.backends.onnxruntime.dialect import DIALECTS

        dialect = DIALECTS[options.place.type]
        return dataclasses.replace(dialect, why_branches_shared="") if options.branch_rows else dialect

    def place_options(self, options: OnnxRuntimeOptions, device: torch.device | None) -> OnnxRuntimeOptions:
        """Return the options for a device; check that this machine fulfils the device's needs."""
        if device is not None:
            options = dataclasses.replace(options, device=str(device))
        if options.cache and options.place.type != "cpu":
            raise Unavailable(
                f"programs that keep a cache do not run on {str(options.place)!r} yet: their buffers lie on the CPU",
                next_step="device='cpu' keeps a cache; cache=False runs on a GPU, and target='eager' generates there",
            )
        check_providers(options.chosen, options.place)
        return options

    def slot_storage(self, request: BuildRequest[OnnxRuntimeOptions]) -> SlotStorage:
        """Return where slots' contents are written: in the model, so that it runs alone, or where any runtime reads."""
        inputs = SlotStorage.FILE if request.options.portable else SlotStorage.DEFAULTS
        return SlotStorage.CONSTANTS if request.mode == "baked" else inputs

    def mark_quantised(self, sites: Mapping[str, Site], options: OnnxRuntimeOptions, mode: str) -> dict[str, Site]:
        """Mark the layers and embeddings that are to be quantised; a baked program is merged in float first."""
        codec = options.codec
        if codec is None or mode == "baked":
            return dict(sites)
        return {
            path: dataclasses.replace(site, packed=_QUANTISED) if _is_quantised(site, codec) else site
            for path, site in sites.items()
        }

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

    def check(self, request: BuildRequest[OnnxRuntimeOptions]) -> None:
        """Refuse options that say how weights are quantised, where none are."""
        from lorac.frontend.quantised_weights import iter_quantised_origins

        super().check(request)
        if not any(True for _ in iter_quantised_origins(request.model)):
            request.options.check_quantisation()

    def weight_passes(self, request: BuildRequest[OnnxRuntimeOptions]) -> Sequence[OnnxPass]:
        from lorac.backends.onnxruntime.quantised.calibration import Calibration
        from lorac.backends.onnxruntime.quantised.products import QuantiseWeights

        options = request.options
        prequantised = _prequantised_matrices(request.model, options)
        if options.codec is None and not prequantised:
            return ()
        calibration = None
        if options.codec is not None and options.algorithm == GPTQ:
            calibration = Calibration(request.model, request.sites, request.base, options.calibration)
        passed = QuantiseWeights(
            options.codec,
            options.product_level,
            prequantised,
            options.head_codec,
            options.algorithm,
            calibration,
            options.is_mixed,
        )
        return (passed,)

    def check_emitted(self, emitted: Emitted) -> None:
        """Refuse to quantise a model of which no weight can be quantised, or a head that it lacks.

        Raises:
            Unavailable: with the reason for one of its weights.
            OptionError: ``head=`` is given, and the model has no such layer.
        """
        options, reports = emitted.request.options, _quantisation_reports(emitted).values()
        if options.head is not None and not any(report.has_head for report in reports):
            raise OptionError(
                f"head={options.head!r} says how an output layer is stored, and the model has none that is as large as "
                "an embedding",
                next_step="leave head= out",
            )
        if options.codec is None or any(report.quantised for report in reports):
            return
        reasons = {f"'{name}' is {why}" for report in reports for name, why in report.floats.items()}
        raise Unavailable(
            f"no weight of the model can be stored as {options.weights}: {min(reasons, default='it has no matrices')}",
            next_step="leave weights= out; dtype='float32' has a model of another precision quantised",
        )

    def write_base_weights(self, emitted: Emitted) -> None:
        """Write the base weights of planned sites; for quantised weights the program's own bytes are stored."""
        from lorac.backends.onnx.build import write_base_weights
        from lorac.backends.onnxruntime.quantised.base_weights import find_quantised, locate_parts, tensors_and_notes

        tensors = emitted.base_tensors()
        quantised = find_quantised(_quantisation_reports(emitted), tensors)
        if not quantised:
            write_base_weights(emitted, tensors)
            return
        parts, notes = tensors_and_notes(quantised)
        floats = {name: tensor for name, tensor in tensors.items() if name not in quantised}
        locations = locate_parts(emitted.open_files(), emitted.program.graphs, quantised)
        write_base_weights(emitted, floats, parts, notes, locations)

    def test(self, engine: AnyOnnxEngine, emitted: Emitted) -> None:
        """Test an engine whose products round nothing that they read.

        How far rounding moves a deep model's outputs says nothing about its slots.
        """
        from lorac.backends.onnx.self_test import run_self_test
        from lorac.backends.onnxruntime.quantised.base_weights import replace_quantised

        reports, options = _quantisation_reports(emitted), emitted.request.options
        if options.product_level > FLOAT32_LEVEL and any(report.quantised for report in reports.values()):
            graphs = {
                name: GraphSession(create_session(engine.files, name, options, rounds=False), g.interface, g.slots)
                for name, g in engine.graphs.items()
            }
            engine = OrtEngine(dataclasses.replace(engine.program, graphs=graphs))
        replace = functools.partial(replace_quantised, reports)
        run_self_test(engine, emitted.program, emitted.request.snapshot, replace)

    def restore_options(
        self, stored: JsonMapping, plans: Mapping[str, SitePlan], device: str | torch.device | None
    ) -> OnnxRuntimeOptions:
        """Return the options of an artifact for a device, if this machine can run it there."""
        options = OnnxRuntimeOptions(**stored)
        if device is not None:
            # The providers in the artifact belong to the device that it was saved on.
            providers = options.providers if options.place.type == torch.device(device).type else None
            options = dataclasses.replace(options, providers=providers, device=str(device))
        options = self.place_options(options, None)
        dtypes = {plan.site.dtype for plan in plans.values()} & set(HALF_PRECISION)
        if dtypes and options.place.type == "cpu":
            names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise Unavailable(
                f"this program is in {names}, in which ONNX Runtime does not compute on the CPU",
                next_step="load it with device='cuda', or compile it from the model with device='cpu'",
            )
        return options

    def read_base_weights(self, files: ProgramFiles) -> Mapping[str, torch.Tensor] | None:
        return dequantised_weights(TensorFile(files[BASE_FILE], files)) if BASE_FILE in files else None


BACKEND = OnnxRuntime()


def _is_quantised(site: Site, codec: Codec) -> bool:
    """Return whether a site is a layer whose weight a program quantises; a product inside a module is a slot's."""
    if site.within is not None or site.dtype != torch.float32 or site.packed:
        return False
    columns = {SiteKind.LINEAR: site.in_features, SiteKind.EMBEDDING: site.out_features}.get(site.kind)
    return columns is not None and codec.why_not(columns) is None


def _quantisation_reports(emitted: Emitted) -> dict[str, QuantisationReport]:
    """Return graph -> the report of its quantisation; empty where nothing was quantised."""
    from lorac.backends.onnxruntime.quantised.quantisation_report import QuantisationReport

    details = ((graph, result.details) for graph, found in emitted.results.items() for result in found.values())
    return {graph: report for graph, report in details if isinstance(report, QuantisationReport)}


def _prequantised_matrices(model: nn.Module, options: OnnxRuntimeOptions) -> tuple[PrequantisedMatrix, ...]:
    """Return the pre-quantised weights of a model as products take them; warn of those that they do not take."""
    from lorac.backends.onnxruntime.quantised.products import PrequantisedMatrix
    from lorac.frontend.quantised_weights import iter_quantised_origins

    found, refused = list[PrequantisedMatrix](), dict[str, str]()
    for name, origin in iter_quantised_origins(model):
        codec = None if origin.codes is None else Codec.of(origin.codes, options.block_size)
        if origin.codes is None or codec is None:
            refused[name] = origin.kind
        else:
            found.append(PrequantisedMatrix(origin.codes.dequantised().numpy(), codec.take(origin.codes)))
    if refused:
        kinds = ", ".join(dict.fromkeys(refused.values()))
        instead = f"quantised anew, as {options.weights}" if options.weights else "stored as float32"
        warn(
            f"{len(refused)} weights came as {kinds}, whose codes ONNX Runtime's products do not take: "
            f"they are {instead}",
            next_step=None if options.weights else "weights='int8' or weights='int4' quantises them anew",
        )
    return tuple(found)
