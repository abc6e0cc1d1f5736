"""The base class of backends that may store base weights in 8 or 4 bits, with lorac's codes for every library."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch

from lorac.backends.onnx.base_backend import OnnxBackend
from lorac.backends.onnx.engine import AnyOnnxEngine, GraphT
from lorac.backends.onnx.model_files import BASE_FILE
from lorac.backends.onnx.quantised.algorithms import GPTQ
from lorac.backends.onnx.quantised.base_weights import dequantised_weights
from lorac.backends.onnx.quantised.codec import Codec
from lorac.backends.onnx.quantised.options import QuantisationOptions
from lorac.errors import OptionError, Unavailable, warn
from lorac.ir.sites.site import Site, SiteKind
from lorac.storage.tensor_file import TensorFile
from lorac.target.backend import BuildRequest
from lorac.target.engine import ProgramFiles

if TYPE_CHECKING:
    from lorac.backends.onnx.emitted_program import EmittedProgram
    from lorac.backends.onnx.passes import OnnxPass
    from lorac.backends.onnx.quantised.quantisation_report import QuantisationReport

QuantOptionsT = TypeVar("QuantOptionsT", bound=QuantisationOptions)
_QUANTISED = "quantised"
"""Stands for a number of bits, which is chosen when the program is written."""


class QuantisingBackend(OnnxBackend[QuantOptionsT, GraphT], Generic[QuantOptionsT, GraphT]):
    """A target that runs ONNX files with weights that may be quantised.

    Attributes:
        takes_tables: whether its products support codes that are indices into a table of levels.
    """

    takes_tables: ClassVar[bool] = True

    def mark_quantised(self, sites: Mapping[str, Site], options: QuantOptionsT, mode: str) -> dict[str, Site]:
        """Mark the layers and embeddings to be quantised; none in a baked program, which is merged in float first."""
        codec = options.codec
        if codec is None or mode == "baked":
            return dict(sites)
        return {
            path: dataclasses.replace(site, packed=_QUANTISED) if _is_quantised(site, codec) else site
            for path, site in sites.items()
        }

    def check(self, request: BuildRequest[QuantOptionsT]) -> None:
        """Refuse options about quantisation if no weight is quantised."""
        from lorac.frontend.quantised_weights import iter_quantised_origins

        super().check(request)
        if not any(True for _ in iter_quantised_origins(request.model)):
            request.options.check_quantisation()

    def weight_passes(self, request: BuildRequest[QuantOptionsT]) -> Sequence[OnnxPass]:
        from lorac.backends.onnx.quantised.calibration import Calibration
        from lorac.backends.onnx.quantised.products import PrequantisedMatrix, QuantiseWeights
        from lorac.frontend.quantised_weights import iter_quantised_origins

        options = request.options
        found, refused = list[PrequantisedMatrix](), dict[str, str]()
        parameters = {name for name, _ in request.model.named_parameters(remove_duplicate=False)}
        for name, origin in iter_quantised_origins(request.model):
            codec = None if origin.codes is None else Codec.of(origin.codes, options.block_size)
            if origin.codes is None or codec is None or (codec.table and not self.takes_tables):
                refused[name] = origin.kind
            else:
                found.append(PrequantisedMatrix(origin.codes.dequantised().numpy(), codec.take(origin.codes)))
        if refused:
            kinds = ", ".join(dict.fromkeys(refused.values()))
            instead = f"quantised anew, as {options.weights}" if options.weights else "stored as float32"
            warn(
                f"{len(refused)} weights were stored as {kinds}, which {self.dialect.name} cannot multiply with: they "
                f"are {instead}",
                next_step=None if options.weights else "weights='int8' or weights='int4' quantises them anew",
            )
        if options.codec is None and not found:
            return ()
        calibration = None
        if options.codec is not None and options.algorithm == GPTQ:
            calibration = Calibration(request.model, request.sites, request.base, options.calibration)
        passed = QuantiseWeights(
            options.codec,
            options.product_level,
            tuple(found),
            options.head_codec,
            options.algorithm,
            calibration,
            options.is_mixed,
            parameters | {name for name, _ in iter_quantised_origins(request.model)},
        )
        return (passed,)

    def check_emitted(self, emitted: EmittedProgram[QuantOptionsT]) -> None:
        """Refuse to quantise a model without any quantisable weight, and ``head=`` for a model without a head.

        Raises:
            Unavailable: naming the reason for one of its weights.
            OptionError: ``head=`` is given, and the model has no output layer as large as an embedding.
        """
        options, reports = emitted.request.options, quantisation_reports(emitted).values()
        if options.head is not None and not any(report.has_head for report in reports):
            raise OptionError(
                f"head={options.head!r} sets how an output layer is stored, and the model has no output layer as "
                "large as an embedding",
                next_step="leave head= out",
            )
        if options.codec is None or any(report.quantised for report in reports):
            return
        reasons = {f"'{name}' is {why}" for report in reports for name, why in report.floats.items()}
        raise Unavailable(
            f"no weight of the model can be stored as {options.weights}: {min(reasons, default='it has no matrices')}",
            next_step="leave weights= out, or give dtype='float32' where the model has another precision",
        )

    def write_base_weights(self, emitted: EmittedProgram[QuantOptionsT]) -> None:
        """Write the base weights of planned sites; for quantised weights, refer to the program's own bytes."""
        from lorac.backends.onnx.build import write_base_weights
        from lorac.backends.onnx.quantised.base_weights import find_quantised, locate_parts, tensors_and_notes

        tensors = emitted.base_tensors()
        quantised = find_quantised(quantisation_reports(emitted), tensors)
        if not quantised:
            write_base_weights(emitted, tensors)
            return
        parts, notes = tensors_and_notes(quantised)
        floats = {name: tensor for name, tensor in tensors.items() if name not in quantised}
        locations = locate_parts(emitted.open_files(), emitted.program.graphs, quantised)
        write_base_weights(emitted, floats, parts, notes, locations)

    def test(self, engine: AnyOnnxEngine, emitted: EmittedProgram[QuantOptionsT]) -> None:
        """Compare the engine with the program after its weights are replaced by the dequantised ones."""
        from lorac.backends.onnx.quantised.base_weights import replace_quantised
        from lorac.backends.onnx.self_test import run_self_test

        replace = functools.partial(replace_quantised, quantisation_reports(emitted))
        run_self_test(engine, emitted.program, emitted.request.snapshot, replace)

    def read_base_weights(self, files: ProgramFiles) -> Mapping[str, torch.Tensor] | None:
        return dequantised_weights(TensorFile(files[BASE_FILE], files)) if BASE_FILE in files else None


def _is_quantised(site: Site, codec: Codec) -> bool:
    """Return whether a site is a layer whose weight a program quantises; weights read inside a module stay float."""
    if site.within is not None or site.dtype != torch.float32 or site.packed:
        return False
    columns = {SiteKind.LINEAR: site.in_features, SiteKind.EMBEDDING: site.out_features}.get(site.kind)
    return columns is not None and codec.why_not(columns) is None


def quantisation_reports(emitted: EmittedProgram[Any]) -> dict[str, QuantisationReport]:
    """Return graph -> the report of its quantisation; empty if nothing was quantised."""
    from lorac.backends.onnx.quantised.quantisation_report import QuantisationReport

    details = ((graph, result.details) for graph, found in emitted.results.items() for result in found.values())
    return {graph: report for graph, report in details if isinstance(report, QuantisationReport)}
