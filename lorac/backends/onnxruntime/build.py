"""Building the engine: emission, sessions, self-test."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
from torch import nn

from lorac.backends.onnx.claims import check_claims
from lorac.backends.onnx.emit import emit
from lorac.backends.onnx.initializers import bake_slots, set_slot_defaults, write_model
from lorac.backends.onnx.model_files import BASE_FILE, graph_folder, list_program_files
from lorac.backends.onnx.self_test import run_self_test
from lorac.backends.onnx.weight_locations import locate_weights
from lorac.backends.onnxruntime.dialect import DIALECTS
from lorac.backends.onnxruntime.engine import GraphSession, OrtEngine
from lorac.backends.onnxruntime.inference_session import create_session
from lorac.backends.onnxruntime.options import FLOAT32_LEVEL, OnnxRuntimeOptions
from lorac.backends.onnxruntime.quantised.base_weights import (
    dequantised_weights,
    find_quantised,
    locate_parts,
    replace_quantised,
    tensors_and_notes,
)
from lorac.backends.onnxruntime.quantised.codec import Codec
from lorac.backends.onnxruntime.quantised.products import PrequantisedMatrix, QuantisationReport, quantise
from lorac.errors import Unavailable, warn
from lorac.frontend.base_weights import collect_base_tensors
from lorac.frontend.quantised_weights import iter_quantised_origins
from lorac.ir.graph.feeds import collect_slot_tensors
from lorac.ir.graph.program import Program
from lorac.ir.slots.composition import ComposedWeights, fill_slots
from lorac.progress import step
from lorac.storage.open_file import open_files
from lorac.storage.process_folders import make_temporary_folder, remove_with_owner
from lorac.storage.tensor_file import TensorFile, find_transposed_weights, make_file_base_reader
from lorac.target.backend import BuildRequest
from lorac.target.engine import ProgramFiles


def build(request: BuildRequest[OnnxRuntimeOptions]) -> OrtEngine:
    """An engine for the request; the host is not kept."""
    folder = make_temporary_folder()
    try:
        engine = _build(request, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    remove_with_owner(engine, folder)
    return engine


def _build(request: BuildRequest[OnnxRuntimeOptions], folder: Path) -> OrtEngine:
    options, plans = request.options, request.plans
    assert request.program is not None
    program = request.program
    step("emission")
    outcomes = _emit(program, request, folder)
    for name, graph in program.graphs.items():
        graph.add_notes(*outcomes[name].told())
    step("session")
    if request.mode != "baked":
        _write_base_weights(program, request, folder, outcomes)
    files = _hold_files(program, folder)
    engine = OrtEngine(
        parts={
            name: GraphSession(create_session(files, name, options), graph.interface, graph.slots)
            for name, graph in program.graphs.items()
        },
        plans=plans,
        base=make_file_base_reader(dequantised_weights(TensorFile(files[BASE_FILE], files)))
        if BASE_FILE in files
        else request.base,
        mode=request.mode,
        files=files,
        options=options,
    )
    if options.self_test:
        step("self-test")
        quantised = any(outcome.quantised for outcome in outcomes.values())
        tried = _unrounded_engine(engine) if quantised and options.accuracy_level > FLOAT32_LEVEL else engine
        run_self_test(tried, program, request.snapshot, functools.partial(replace_quantised, outcomes))
    return engine


def _emit(program: Program, request: BuildRequest[OnnxRuntimeOptions], folder: Path) -> dict[str, QuantisationReport]:
    """Write each graph's model. Its slots hold what was asked for, for good; or the base's, until another is given.

    Returns:
        What became of each graph's weights.
    """
    baked, outcomes = request.mode == "baked", dict[str, QuantisationReport]()
    slots = fill_slots(request.plans, request.snapshot if baked else ComposedWeights(()), request.base)
    given = _prequantised_matrices(request.model, request.options)
    for name, graph in program.graphs.items():
        model = emit(graph, DIALECTS[request.options.place.type])
        (bake_slots if baked else set_slot_defaults)(model, collect_slot_tensors(graph.slots, request.plans, slots))
        outcomes[name] = _quantise_weights(model, request.options, given)
        write_model(model, graph_folder(folder, name))
    _refuse_unquantisable(outcomes.values(), request.options)
    return outcomes


def _prequantised_matrices(model: nn.Module, options: OnnxRuntimeOptions) -> list[PrequantisedMatrix]:
    """The weights of a host that came quantised, as products take them; those that they do not take are told."""
    found, lost = list[PrequantisedMatrix](), dict[str, str]()
    for name, came in iter_quantised_origins(model):
        codec = None if came.codes is None else Codec.of(came.codes, options.block_size)
        if came.codes is None or codec is None:
            lost[name] = came.kind
        else:
            found.append(PrequantisedMatrix(came.codes.dequantised().numpy(), codec.take(came.codes)))
    if lost:
        kinds = ", ".join(dict.fromkeys(lost.values()))
        held = f"quantised anew, as {options.weights}" if options.weights else "held as float32"
        warn(
            f"{len(lost)} weights came as {kinds}, whose codes ONNX Runtime's products do not take: they are {held}",
            next_step=None if options.weights else "weights='int8' or weights='int4' quantises them anew",
        )
    return found


def _quantise_weights(
    model: ir.Model, options: OnnxRuntimeOptions, given: Sequence[PrequantisedMatrix]
) -> QuantisationReport:
    """Quantise a model's weights, in place, where the options say so or they came quantised."""
    if options.codec is None and not given:
        return QuantisationReport()
    outcome = quantise(model, options.codec, options.accuracy_level, given)
    check_claims(model, DIALECTS[options.place.type])
    return outcome


def _refuse_unquantisable(outcomes: Iterable[QuantisationReport], options: OnnxRuntimeOptions) -> None:
    """Refuse to quantise a model of which nothing can be.

    Raises:
        Unavailable: saying why, for one of its weights.
    """
    if options.codec is None or any(outcome.quantised for outcome in outcomes):
        return
    reasons = {f"'{name}' is {why}" for outcome in outcomes for name, why in outcome.floats.items()}
    raise Unavailable(
        f"no weight of the model can be held as {options.weights}: {min(reasons, default='it has no matrices')}",
        next_step="leave weights= out; dtype='float32' has a model of another precision quantised",
    )


def _unrounded_engine(engine: OrtEngine) -> OrtEngine:
    """An engine over the same program whose products round nothing that they read.

    How far rounding moves a deep model's answers says nothing of its slots, so they are tried without it.
    """
    parts = {
        name: GraphSession(create_session(engine.files, name, engine.options, rounds=False), part.signature, part.slots)
        for name, part in engine.parts.items()
    }
    return OrtEngine(
        parts=parts,
        plans=engine.plans,
        base=engine.base,
        mode=engine.mode,
        files=engine.files,
        options=engine.options,
    )


def _write_base_weights(
    program: Program,
    request: BuildRequest[OnnxRuntimeOptions],
    folder: Path,
    outcomes: Mapping[str, QuantisationReport],
) -> None:
    """Write the base weights of planned sites: mixtures, and adapters that come later, may be made of them.

    Of what is quantised the program's own bytes are kept.
    """
    tensors = collect_base_tensors(request.model, {path: plan.site for path, plan in request.plans.items()})
    pieces = find_quantised(outcomes, tensors)
    parts, notes = tensors_and_notes(pieces)
    floats = {name: tensor for name, tensor in tensors.items() if name not in pieces}
    columns = [name for name in find_transposed_weights(request.plans.values()) if name in floats]
    files = _hold_files(program, folder)
    joined = {pack.sizes for graph in program.graphs.values() for pack in graph.packs.values()}
    places = locate_weights(files, program.graphs, floats, joined) | locate_parts(files, program.graphs, pieces)
    TensorFile.write(folder / BASE_FILE, floats | parts, columns, notes, elsewhere=places)


def _hold_files(program: Program, folder: Path) -> ProgramFiles:
    return open_files(folder, (name for name in list_program_files(program.graphs) if (folder / name).exists()))
