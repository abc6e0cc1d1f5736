"""Building the engine: emission, the self-test, a network and a plan per graph."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lorac.backends.onnx.emit import emit
from lorac.backends.onnx.files import BASE, MODEL, WEIGHTS, home_of, name_of
from lorac.backends.onnx.sharing import places_of
from lorac.backends.onnx.writing import bake, write
from lorac.backends.tensorrt import library
from lorac.backends.tensorrt.caching import PlanCache, plan_key
from lorac.backends.tensorrt.capabilities import chosen, local, member
from lorac.backends.tensorrt.checking import OnCpu, check
from lorac.backends.tensorrt.device.requirements import place_of, tell_lacking
from lorac.backends.tensorrt.dialect import DIALECT
from lorac.backends.tensorrt.engine import PLAN, Plan, TrtEngine, files_of
from lorac.backends.tensorrt.network import FREE, Parsed, check_inputs, dtypes_of, parse
from lorac.backends.tensorrt.options import Options
from lorac.backends.tensorrt.profiles import Ranges, ranges_of, refuse_unknown
from lorac.backends.tensorrt.refitting import flag as replacing
from lorac.backends.tensorrt.refitting import mark
from lorac.errors import OptionError, Unavailable
from lorac.ir.engine import BuildRequest, Files
from lorac.ir.graph.feeds import named_tensors
from lorac.ir.graph.graph import Graph
from lorac.ir.graph.program import Program
from lorac.ir.slots.emits import refuse_unemitted
from lorac.ir.slots.snapshot import Snapshot, slots_of
from lorac.ir.store.held import hold
from lorac.ir.store.owners import remove_with, temporary_folder
from lorac.ir.store.tensors import TensorFile, base_tensors, by_columns, file_base
from lorac.progress import Progress, progress

_MIB = 20
"""Bytes of a MiB, as a power of two."""


def build(request: BuildRequest[Options]) -> TrtEngine:
    """An engine for the request; the host is not kept.

    Raises:
        Unavailable: an op is not taken, or no plan was built.
        OptionError: ``profiles=`` that do not fit the model.
    """
    _refuse_refit(request)
    folder = temporary_folder()
    try:
        with progress("compiling for TensorRT", total=5) as report:
            engine = _build(request, folder, report)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    remove_with(engine, folder)
    tell_lacking()
    return engine


def _build(request: BuildRequest[Options], folder: Path, report: Progress) -> TrtEngine:
    options, plans = request.options, request.plans
    refuse_unemitted(options.aux, plans.values())
    report.step("capture and passes")
    program = request.program(options.aux)
    refuse_unknown(options.profiles, program.signatures)
    report.step("emission")
    _emit(program, request, folder)
    if request.mode != "baked":
        _keep_base(program, request, folder)
    emitted = _held(program, folder)
    base = file_base(TensorFile(emitted[BASE], emitted)) if BASE in emitted else request.base
    if options.self_test:
        report.step("self-test")
        tried = OnCpu(program, plans, base, "baked" if _holds_constants(request) else request.mode, emitted)
        check(tried, program, _constants(request))
    report.step("plans")
    built = {name: _built(graph, program, request, folder) for name, graph in program.graphs.items()}
    files = _held(program, folder)
    return TrtEngine(
        parts={name: plan(file=files[name_of(name, PLAN)]) for name, plan in built.items()},
        plans=plans,
        base=base,
        mode=request.mode,
        files=files,
        options=options,
        device=place_of(options.device),
    )


def _holds_constants(request: BuildRequest[Options]) -> bool:
    """Whether slots are constants of the plan, which are baked or replaced there, and no inputs."""
    return request.mode == "baked" or request.options.refit


def _constants(request: BuildRequest[Options]) -> Snapshot:
    """What slots hold that are constants: what is baked, else the base's."""
    return request.snapshot if request.mode == "baked" or not request.options.refit else Snapshot(())


def _emit(program: Program, request: BuildRequest[Options], folder: Path) -> None:
    """Write each graph's model; its slots are inputs and nothing else, or hold what was asked for, for good."""
    constant = _holds_constants(request)
    slots = slots_of(request.plans, _constants(request), request.base) if constant else {}
    for name, graph in program.graphs.items():
        model = emit(graph, program.signatures[name], DIALECT)
        if constant:
            bake(model, named_tensors(graph.slots, request.plans, slots))
        write(model, home_of(folder, name))


def _keep_base(program: Program, request: BuildRequest[Options], folder: Path) -> None:
    """Write the base weights of planned sites that no model holds as they are."""
    tensors = base_tensors(request.model, {path: plan.site for path, plan in request.plans.items()})
    places = places_of(_held(program, folder), program.graphs, tensors)
    TensorFile.write(folder / BASE, tensors, by_columns(request.plans.values()), elsewhere=places)


def _held(program: Program, folder: Path) -> Files:
    return hold(folder, (name for name in files_of(program.graphs) if (folder / name).exists()))


# ── One plan ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _built(graph: Graph, program: Program, request: BuildRequest[Options], folder: Path) -> functools.partial[Plan]:
    """Build a graph's plan, or find it where plans are kept, and write it beside its model: all of it but the file."""
    signature, options, home = program.signatures[graph.name], request.options, home_of(folder, graph.name)
    inputs = {} if _holds_constants(request) else graph.slots
    dtypes = dtypes_of(graph, signature, list(inputs))
    ranges = ranges_of(graph, signature, options.profiles, request.snapshot, inputs)
    capabilities = chosen(options.target_capabilities)

    def new() -> memoryview:
        parsed = parse(home / MODEL)
        check_inputs(parsed, dtypes, ranges)
        if options.refit:
            mark(parsed.network, graph.slots, graph.slots)
        return _plan_of(parsed, graph.name, _settings(parsed, ranges, options, capabilities))

    (home / PLAN).write_bytes(_kept(new, program, options, folder, graph.name, ranges))
    return functools.partial(
        Plan,
        signature=signature,
        slots=graph.slots,
        ranges=ranges,
        dtypes=dtypes,
        capabilities=capabilities,
        made_by=library.told(),
    )


def _kept(
    new: Callable[[], memoryview], program: Program, options: Options, folder: Path, graph: str, ranges: Ranges
) -> bytes | memoryview:
    """A graph's plan out of the folder that keeps plans; a new one where there is no such folder, or none in it."""
    if options.plan_cache is None:
        return new()
    held = _held(program, folder)
    own = [held[name] for name in (name_of(graph, MODEL), name_of(graph, WEIGHTS)) if name in held]
    told = {name: getattr(options, name) for name in _BUILT_BY}
    key = plan_key(own, chosen(options.target_capabilities), ranges=ranges, **told)
    return PlanCache(Path(options.plan_cache)).plan(key, new)


_TOLD_LATER = ("aux", "self_test", "profiles", "target_capabilities", "plan_cache", "device")
"""Options that are in a key by what comes of them, or by which the same plan is built."""
_BUILT_BY = tuple(spec.name for spec in fields(Options) if spec.name not in _TOLD_LATER)


def _plan_of(parsed: Parsed, graph: str, settings: Any) -> memoryview:
    """The plan of a network."""
    with library.listening() as said:
        plan = parsed.builder.build_serialized_network(parsed.network, settings)
        if plan is None:
            raise Unavailable(
                f"{library.told()} built no plan of graph '{graph}': {said.why()}",
                next_step="target='onnxruntime' and target='eager' run it; profiles= of fewer sizes may be built",
            )
    return memoryview(plan)


def _settings(parsed: Parsed, ranges: Ranges, options: Options, capabilities: Sequence[str]) -> Any:
    """The library's settings for the target's options."""
    trt, network = library.trt(), parsed.network
    settings = parsed.builder.create_builder_config()
    profile = parsed.builder.create_optimization_profile()
    for value in (network.get_input(i) for i in range(network.num_inputs)):
        _refuse_numbers(value)
        if FREE in tuple(value.shape):
            least, usual, most = zip(*((axis.least, axis.usual, axis.most) for axis in ranges[value.name]), strict=True)
            profile.set_shape(value.name, least, usual, most)
    settings.add_optimization_profile(profile)
    flags = {
        trt.BuilderFlag.TF32: options.tf32,
        trt.BuilderFlag.STRICT_NANS: options.strict_nans,
        trt.BuilderFlag.WEIGHT_STREAMING: options.weight_streaming,
        replacing(): options.refit,
    }
    for flag, wanted in flags.items():
        (settings.set_flag if wanted else settings.clear_flag)(flag)
    if library.is_rtx() and options.cuda_graphs:  # else a context may allocate while it runs, which no graph can hold
        settings.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if options.builder_optimization_level is not None:
        settings.builder_optimization_level = options.builder_optimization_level
    if options.workspace is not None:
        settings.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace << _MIB)
    if capabilities:
        settings.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            settings.set_compute_capability(member(capability), index)
    return settings


def _refuse_numbers(value: Any) -> None:
    """Refuse an input that says how large something is: a plan would be built for some of its values."""
    if value.is_shape_tensor:
        raise Unavailable(
            f"input '{value.name}' is a number by which the model decides on sizes, which a plan takes none for",
            next_step="give it as a plain number in example_inputs=, so that it is a constant of the program",
        )


def _refuse_refit(request: BuildRequest[Options]) -> None:
    """Refuse constants that can be replaced where there are none, or the library cannot build such a plan.

    Raises:
        OptionError: nothing is merged.
        Unavailable: there is no GPU.
    """
    if request.options.refit and request.mode != "fused":
        raise OptionError(
            f"refit=True replaces merged weights, of which a program that is {request.mode} has none to replace",
            next_step="give mode='fused' with it, or leave it out",
        )
    if request.options.refit and local() is None:
        raise Unavailable(
            "refit=True makes a plan whose constants can be replaced, which the library builds only where there is an "
            "NVIDIA GPU",
            next_step="leave it out: mode='fused' takes merged weights as inputs, and builds anywhere",
        )
