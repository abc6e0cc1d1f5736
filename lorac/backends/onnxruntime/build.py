"""Building the engine: emission, sessions, self-test."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
from torch import nn

from lorac.backends.onnx.claims import refuse_unclaimed
from lorac.backends.onnx.emit import emit
from lorac.backends.onnx.files import BASE, home_of, names_of
from lorac.backends.onnx.selftest import self_test
from lorac.backends.onnx.sharing import places_of
from lorac.backends.onnx.writing import bake, fill, write
from lorac.backends.onnxruntime.dialect import DIALECTS
from lorac.backends.onnxruntime.engine import GraphSession, OrtEngine
from lorac.backends.onnxruntime.options import IN_FLOAT, Options
from lorac.backends.onnxruntime.quantised.base import as_computed, pieces_of, places_in, standing_in, told
from lorac.backends.onnxruntime.quantised.codec import Codec
from lorac.backends.onnxruntime.quantised.products import Given, Outcome, quantise
from lorac.backends.onnxruntime.session import new_session
from lorac.errors import Unavailable, warn
from lorac.ir.engine import BuildRequest, Files
from lorac.ir.graph.feeds import named_tensors
from lorac.ir.graph.program import Program
from lorac.ir.host.packed import came_as
from lorac.ir.slots.emits import refuse_unemitted
from lorac.ir.slots.snapshot import Snapshot, slots_of
from lorac.ir.store.held import hold
from lorac.ir.store.owners import remove_with, temporary_folder
from lorac.ir.store.tensors import TensorFile, base_tensors, by_columns, file_base
from lorac.progress import Progress, progress


def build(request: BuildRequest[Options]) -> OrtEngine:
    """An engine for the request; the host is not kept."""
    if not any(True for _ in came_as(request.model)):
        request.options.refuse_idle()
    folder = temporary_folder()
    try:
        with progress("compiling for ONNX Runtime", total=4) as report:
            engine = _build(request, folder, report)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    remove_with(engine, folder)
    return engine


def _build(request: BuildRequest[Options], folder: Path, report: Progress) -> OrtEngine:
    options, plans = request.options, request.plans
    refuse_unemitted(options.aux, plans.values())
    report.step("capture and passes")
    program = request.program(options.aux)
    report.step("emission")
    outcomes = _emit(program, request, folder)
    program = _noted(program, outcomes)
    report.step("session")
    if request.mode != "baked":
        _keep_base(program, request, folder, outcomes)
    files = _held(program, folder)
    engine = OrtEngine(
        parts={
            name: GraphSession(new_session(files, name, options), program.signatures[name], graph.slots)
            for name, graph in program.graphs.items()
        },
        plans=plans,
        base=file_base(as_computed(TensorFile(files[BASE], files))) if BASE in files else request.base,
        mode=request.mode,
        files=files,
        options=options,
    )
    if options.self_test:
        report.step("self-test")
        quantised = any(outcome.quantised for outcome in outcomes.values())
        tried = _in_float(engine) if quantised and options.accuracy_level > IN_FLOAT else engine
        self_test(tried, program, request.snapshot, functools.partial(standing_in, outcomes))
    return engine


def _emit(program: Program, request: BuildRequest[Options], folder: Path) -> dict[str, Outcome]:
    """Write each graph's model. Its slots hold what was asked for, for good; or the base's, until another is given.

    Returns:
        What became of each graph's weights.
    """
    baked, outcomes = request.mode == "baked", dict[str, Outcome]()
    slots = slots_of(request.plans, request.snapshot if baked else Snapshot(()), request.base)
    given = _given(request.model, request.options)
    for name, graph in program.graphs.items():
        model = emit(graph, program.signatures[name], DIALECTS[request.options.place.type])
        (bake if baked else fill)(model, named_tensors(graph.slots, request.plans, slots))
        outcomes[name] = _quantised(model, request.options, given)
        write(model, home_of(folder, name))
    _refuse_idle(outcomes.values(), request.options)
    return outcomes


def _given(model: nn.Module, options: Options) -> list[Given]:
    """The weights of a host that came quantised, as products take them; those that they do not take are told."""
    found, lost = list[Given](), dict[str, str]()
    for name, came in came_as(model):
        codec = None if came.codes is None else Codec.of(came.codes, options.block_size)
        if came.codes is None or codec is None:
            lost[name] = came.kind
        else:
            found.append(Given(came.codes.dequantised().numpy(), codec.take(came.codes)))
    if lost:
        kinds = ", ".join(dict.fromkeys(lost.values()))
        held = f"quantised anew, as {options.weights}" if options.weights else "held as float32"
        warn(
            f"{len(lost)} weights came as {kinds}, whose codes ONNX Runtime's products do not take: they are {held}",
            next_step=None if options.weights else "weights='int8' or weights='int4' quantises them anew",
        )
    return found


def _quantised(model: ir.Model, options: Options, given: Sequence[Given]) -> Outcome:
    """Quantise a model's weights, in place, where the options say so or they came quantised."""
    if options.codec is None and not given:
        return Outcome()
    outcome = quantise(model, options.codec, options.accuracy_level, given)
    refuse_unclaimed(model, DIALECTS[options.place.type])
    return outcome


def _refuse_idle(outcomes: Iterable[Outcome], options: Options) -> None:
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


def _noted(program: Program, outcomes: Mapping[str, Outcome]) -> Program:
    """The program whose signatures say what became of its weights."""
    signatures = {
        name: dataclasses.replace(signature, notes=(*signature.notes, *outcomes[name].told()))
        for name, signature in program.signatures.items()
    }
    return Program(program.graphs, signatures)


def _in_float(engine: OrtEngine) -> OrtEngine:
    """An engine over the same program whose products round nothing that they read.

    How far rounding moves a deep model's answers says nothing of its slots, so they are tried without it.
    """
    parts = {
        name: GraphSession(new_session(engine.files, name, engine.options, rounds=False), part.signature, part.slots)
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


def _keep_base(program: Program, request: BuildRequest[Options], folder: Path, outcomes: Mapping[str, Outcome]) -> None:
    """Write the base weights of planned sites: mixtures, and adapters that come later, may be made of them.

    Of what is quantised the program's own bytes are kept.
    """
    tensors = base_tensors(request.model, {path: plan.site for path, plan in request.plans.items()})
    pieces = pieces_of(outcomes, tensors)
    parts, notes = told(pieces)
    floats = {name: tensor for name, tensor in tensors.items() if name not in pieces}
    columns = [name for name in by_columns(request.plans.values()) if name in floats]
    files = _held(program, folder)
    joined = {pack.sizes for graph in program.graphs.values() for pack in graph.packs.values()}
    places = places_of(files, program.graphs, floats, joined) | places_in(files, program.graphs, pieces)
    TensorFile.write(folder / BASE, floats | parts, columns, notes, elsewhere=places)


def _held(program: Program, folder: Path) -> Files:
    return hold(folder, (name for name in names_of(program.graphs) if (folder / name).exists()))
