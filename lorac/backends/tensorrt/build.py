"""Building the engine: emission, the self-test, a network and a plan per graph."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lorac.backends.onnx.emit import emit
from lorac.backends.onnx.initializers import bake_slots, write_model
from lorac.backends.onnx.model_files import BASE_FILE, MODEL_FILE, WEIGHTS_FILE, graph_file, graph_folder
from lorac.backends.onnx.weight_locations import locate_weights
from lorac.backends.tensorrt import library
from lorac.backends.tensorrt.capabilities import capability_member, choose_capabilities, local_capability
from lorac.backends.tensorrt.cpu_check import CpuProgram, check_on_cpu
from lorac.backends.tensorrt.device.requirements import plan_device, warn_missing_requirement
from lorac.backends.tensorrt.dialect import DIALECT
from lorac.backends.tensorrt.engine import PLAN, GraphPlan, TrtEngine, plan_files
from lorac.backends.tensorrt.network import DYNAMIC, ParsedNetwork, check_inputs, input_dtypes, parse_model
from lorac.backends.tensorrt.options import TensorRTOptions
from lorac.backends.tensorrt.plan_cache import PlanCache, plan_key
from lorac.backends.tensorrt.profiles import SizeRanges, check_profile_names, compute_ranges
from lorac.backends.tensorrt.refitting import mark_refittable
from lorac.backends.tensorrt.refitting import refit_flag as replacing
from lorac.errors import OptionError, Unavailable
from lorac.frontend.base_weights import collect_base_tensors
from lorac.ir.graph.feeds import collect_slot_tensors
from lorac.ir.graph.graph import Graph
from lorac.ir.graph.program import Program
from lorac.ir.slots.composition import ComposedWeights, fill_slots
from lorac.progress import step
from lorac.storage.open_file import open_files
from lorac.storage.process_folders import make_temporary_folder, remove_with_owner
from lorac.storage.tensor_file import TensorFile, find_transposed_weights, make_file_base_reader
from lorac.target.backend import BuildRequest
from lorac.target.engine import ProgramFiles

_MIB = 20
"""Bytes of a MiB, as a power of two."""


def build(request: BuildRequest[TensorRTOptions]) -> TrtEngine:
    """An engine for the request; the host is not kept.

    Raises:
        Unavailable: an op is not taken, or no plan was built.
        OptionError: ``profiles=`` that do not fit the model.
    """
    folder = make_temporary_folder()
    try:
        engine = _build(request, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    remove_with_owner(engine, folder)
    warn_missing_requirement()
    return engine


def _build(request: BuildRequest[TensorRTOptions], folder: Path) -> TrtEngine:
    options, plans = request.options, request.plans
    assert request.program is not None
    program = request.program
    check_profile_names(options.profiles, [graph.interface for graph in program.graphs.values()])
    step("emission")
    _emit(program, request, folder)
    if request.mode != "baked":
        _write_base_weights(program, request, folder)
    emitted = _hold_files(program, folder)
    base = make_file_base_reader(TensorFile(emitted[BASE_FILE], emitted)) if BASE_FILE in emitted else request.base
    if options.self_test:
        step("self-test")
        tried = CpuProgram(program, plans, base, "baked" if _has_constant_slots(request) else request.mode, emitted)
        check_on_cpu(tried, program, _constant_snapshot(request))
    step("plans")
    built = {name: _build_graph_plan(graph, program, request, folder) for name, graph in program.graphs.items()}
    files = _hold_files(program, folder)
    return TrtEngine(
        parts={name: plan(file=files[graph_file(name, PLAN)]) for name, plan in built.items()},
        plans=plans,
        base=base,
        mode=request.mode,
        files=files,
        options=options,
        device=plan_device(options.device),
    )


def _has_constant_slots(request: BuildRequest[TensorRTOptions]) -> bool:
    """Whether slots are constants of the plan, which are baked or replaced there, and no inputs."""
    return request.mode == "baked" or request.options.refit


def _constant_snapshot(request: BuildRequest[TensorRTOptions]) -> ComposedWeights:
    """What slots hold that are constants: what is baked, else the base's."""
    return request.snapshot if request.mode == "baked" or not request.options.refit else ComposedWeights(())


def _emit(program: Program, request: BuildRequest[TensorRTOptions], folder: Path) -> None:
    """Write each graph's model; its slots are inputs and nothing else, or hold what was asked for, for good."""
    constant = _has_constant_slots(request)
    slots = fill_slots(request.plans, _constant_snapshot(request), request.base) if constant else {}
    for name, graph in program.graphs.items():
        model = emit(graph, DIALECT)
        if constant:
            bake_slots(model, collect_slot_tensors(graph.slots, request.plans, slots))
        write_model(model, graph_folder(folder, name))


def _write_base_weights(program: Program, request: BuildRequest[TensorRTOptions], folder: Path) -> None:
    """Write the base weights of planned sites that no model holds as they are."""
    tensors = collect_base_tensors(request.model, {path: plan.site for path, plan in request.plans.items()})
    places = locate_weights(_hold_files(program, folder), program.graphs, tensors)
    TensorFile.write(folder / BASE_FILE, tensors, find_transposed_weights(request.plans.values()), elsewhere=places)


def _hold_files(program: Program, folder: Path) -> ProgramFiles:
    return open_files(folder, (name for name in plan_files(program.graphs) if (folder / name).exists()))


# ── One plan ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _build_graph_plan(
    graph: Graph, program: Program, request: BuildRequest[TensorRTOptions], folder: Path
) -> functools.partial[GraphPlan]:
    """Build a graph's plan, or find it where plans are kept, and write it beside its model: all of it but the file."""
    signature, options, home = graph.interface, request.options, graph_folder(folder, graph.name)
    inputs = {} if _has_constant_slots(request) else graph.slots
    dtypes = input_dtypes(graph, signature, list(inputs))
    ranges = compute_ranges(graph, signature, options.profiles, request.snapshot, inputs)
    capabilities = choose_capabilities(options.target_capabilities)

    def new() -> memoryview:
        parsed = parse_model(home / MODEL_FILE)
        check_inputs(parsed, dtypes, ranges)
        if options.refit:
            mark_refittable(parsed.network, graph.slots, graph.slots)
        return _build_plan(parsed, graph.name, _builder_config(parsed, ranges, options, capabilities))

    (home / PLAN).write_bytes(_cached_plan(new, program, options, folder, graph.name, ranges))
    return functools.partial(
        GraphPlan,
        signature=signature,
        slots=graph.slots,
        ranges=ranges,
        dtypes=dtypes,
        capabilities=capabilities,
        made_by=library.name_and_version(),
    )


def _cached_plan(
    new: Callable[[], memoryview],
    program: Program,
    options: TensorRTOptions,
    folder: Path,
    graph: str,
    ranges: SizeRanges,
) -> bytes | memoryview:
    """A graph's plan out of the folder that keeps plans; a new one where there is no such folder, or none in it."""
    if options.plan_cache is None:
        return new()
    held = _hold_files(program, folder)
    own = [held[name] for name in (graph_file(graph, MODEL_FILE), graph_file(graph, WEIGHTS_FILE)) if name in held]
    told = {name: getattr(options, name) for name in _KEY_OPTIONS}
    key = plan_key(own, choose_capabilities(options.target_capabilities), ranges=ranges, **told)
    return PlanCache(Path(options.plan_cache)).plan(key, new)


_NOT_IN_KEY = ("aux", "self_test", "profiles", "target_capabilities", "plan_cache", "device")
"""Options that are in a key by what comes of them, or by which the same plan is built."""
_KEY_OPTIONS = tuple(spec.name for spec in fields(TensorRTOptions) if spec.name not in _NOT_IN_KEY)


def _build_plan(parsed: ParsedNetwork, graph: str, settings: Any) -> memoryview:
    """The plan of a network."""
    with library.collect_errors() as said:
        plan = parsed.builder.build_serialized_network(parsed.network, settings)
        if plan is None:
            raise Unavailable(
                f"{library.name_and_version()} built no plan of graph '{graph}': {said.why()}",
                next_step="target='onnxruntime' and target='eager' run it; profiles= of fewer sizes may be built",
            )
    return memoryview(plan)


def _builder_config(
    parsed: ParsedNetwork, ranges: SizeRanges, options: TensorRTOptions, capabilities: Sequence[str]
) -> Any:
    """The library's settings for the target's options."""
    trt, network = library.trt(), parsed.network
    settings = parsed.builder.create_builder_config()
    profile = parsed.builder.create_optimization_profile()
    for value in (network.get_input(i) for i in range(network.num_inputs)):
        _refuse_shape_tensor(value)
        if DYNAMIC in tuple(value.shape):
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
            settings.set_compute_capability(capability_member(capability), index)
    return settings


def _refuse_shape_tensor(value: Any) -> None:
    """Refuse an input that says how large something is: a plan would be built for some of its values."""
    if value.is_shape_tensor:
        raise Unavailable(
            f"input '{value.name}' is a number by which the model decides on sizes, which a plan takes none for",
            next_step="give it as a plain number in example_inputs=, so that it is a constant of the program",
        )


def check_refit(request: BuildRequest[TensorRTOptions]) -> None:
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
    if request.options.refit and local_capability() is None:
        raise Unavailable(
            "refit=True makes a plan whose constants can be replaced, which the library builds only where there is an "
            "NVIDIA GPU",
            next_step="leave it out: mode='fused' takes merged weights as inputs, and builds anywhere",
        )
