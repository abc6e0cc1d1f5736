"""Building the engine: emission, sessions, self-test."""

from __future__ import annotations

import shutil
from pathlib import Path

from lorac.backends.onnx.emit import emit
from lorac.backends.onnx.files import BASE, home_of, names_of
from lorac.backends.onnx.selftest import self_test
from lorac.backends.onnx.sharing import places_of
from lorac.backends.onnx.writing import bake, fill, write
from lorac.backends.onnxruntime.dialect import DIALECT
from lorac.backends.onnxruntime.engine import GraphSession, OrtEngine
from lorac.backends.onnxruntime.options import Options
from lorac.backends.onnxruntime.session import new_session
from lorac.ir.engine import BuildRequest, Files
from lorac.ir.graph.feeds import named_tensors
from lorac.ir.graph.program import Program
from lorac.ir.slots.emits import refuse_unemitted
from lorac.ir.slots.snapshot import Snapshot, slots_of
from lorac.ir.store.held import hold
from lorac.ir.store.owners import remove_with, temporary_folder
from lorac.ir.store.tensors import TensorFile, base_tensors, by_columns, file_base
from lorac.progress import Progress, progress


def build(request: BuildRequest[Options]) -> OrtEngine:
    """An engine for the request; the host is not kept."""
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
    _emit(program, request, folder)
    report.step("session")
    if request.mode != "baked":
        _keep_base(program, request, folder)
    files = _held(program, folder)
    engine = OrtEngine(
        parts={
            name: GraphSession(new_session(files, name, options), program.signatures[name], graph.slots)
            for name, graph in program.graphs.items()
        },
        plans=plans,
        base=file_base(TensorFile(files[BASE], files)) if BASE in files else request.base,
        mode=request.mode,
        files=files,
        options=options,
    )
    if options.self_test:
        report.step("self-test")
        self_test(engine, program, request.snapshot)
    return engine


def _emit(program: Program, request: BuildRequest[Options], folder: Path) -> None:
    """Write each graph's model. Its slots hold what was asked for, for good; or the base's, until another is given."""
    baked = request.mode == "baked"
    slots = slots_of(request.plans, request.snapshot if baked else Snapshot(()), request.base)
    for name, graph in program.graphs.items():
        model = emit(graph, program.signatures[name], DIALECT)
        (bake if baked else fill)(model, named_tensors(graph.slots, request.plans, slots))
        write(model, home_of(folder, name))


def _keep_base(program: Program, request: BuildRequest[Options], folder: Path) -> None:
    """Write the base weights of planned sites: mixtures, and adapters that come later, may be made of them."""
    tensors = base_tensors(request.model, {path: plan.site for path, plan in request.plans.items()})
    joined = {pack.sizes for graph in program.graphs.values() for pack in graph.packs.values()}
    places = places_of(_held(program, folder), program.graphs, tensors, joined)
    TensorFile.write(folder / BASE, tensors, by_columns(request.plans.values()), elsewhere=places)


def _held(program: Program, folder: Path) -> Files:
    return hold(folder, (name for name in names_of(program.graphs) if (folder / name).exists()))
