"""Building a plan: from an emitted model to a network, and from the network to a plan for given sizes and GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from lorac.backends.onnx.emitted_program import EmittedProgram
from lorac.backends.onnx.model_files import MODEL_FILE, WEIGHTS_FILE, graph_file, graph_folder
from lorac.backends.tensorrt.engine import PLAN_FILE, PlanFacts
from lorac.backends.tensorrt.library import (
    capability_member,
    choose_capabilities,
    collect_errors,
)
from lorac.backends.tensorrt.network import DYNAMIC, ParsedNetwork, check_inputs, input_dtypes, parse_model
from lorac.backends.tensorrt.options import TensorRTOptions
from lorac.backends.tensorrt.plan_cache import CachedFile, PlanCache, plan_key
from lorac.backends.tensorrt.profiles import SizeRanges, compute_ranges
from lorac.backends.tensorrt.refitting import mark_refittable, refit_flag
from lorac.errors import Unavailable

if TYPE_CHECKING:
    import tensorrt

_MIB = 20
"""Bytes of a MiB, as a power of two."""
_NOT_IN_KEY = ("aux", "self_test", "profiles", "library", "target_capabilities", "plan_cache", "device")
"""Options that do not change the plan, or whose effect is in the key of a plan already."""
_KEY_OPTIONS = tuple(spec.name for spec in fields(TensorRTOptions) if spec.name not in _NOT_IN_KEY)


def build_plan(emitted: EmittedProgram[TensorRTOptions], name: str) -> PlanFacts:
    """Build a graph's plan for torch's current GPU; write it beside the graph's model.

    Raises:
        Unavailable: the library does not support an op, or cannot build a plan.
        OptionError: ``profiles=`` do not fit the model.
    """
    request, graph = emitted.request, emitted.program.graphs[name]
    options, folder = request.options, graph_folder(emitted.folder, name)
    library = options.builder
    inputs = {} if request.mode == "baked" or options.refit else graph.slots
    facts = PlanFacts(
        ranges=compute_ranges(graph, options.profiles, request.snapshot, inputs),
        dtypes=input_dtypes(graph, list(inputs), library),
        capabilities=choose_capabilities(options.target_capabilities, library),
        made_by=library.name_and_version,
    )
    cache = None if options.plan_cache is None else PlanCache(Path(options.plan_cache))
    timings = None if cache is None or library.is_rtx else cache.timings(library)  # RTX measures none while it builds

    def build() -> memoryview:
        parsed = parse_model(folder / MODEL_FILE, library)
        check_inputs(parsed, facts.dtypes, facts.ranges)
        if options.refit:
            mark_refittable(parsed.network, graph.slots)
        config = _builder_config(parsed, facts.ranges, options, facts.capabilities)
        return _build_plan(parsed, name, config, timings)

    if cache is None:
        plan: bytes | memoryview = build()
    else:
        names, files = (graph_file(name, MODEL_FILE), graph_file(name, WEIGHTS_FILE)), emitted.open_files()
        settings = {option: getattr(options, option) for option in _KEY_OPTIONS}
        model = [files[file] for file in names if file in files]
        plan = cache.plan(plan_key(model, facts.capabilities, library, ranges=facts.ranges, **settings), build)
    (folder / PLAN_FILE).write_bytes(plan)
    return facts


def _build_plan(
    parsed: ParsedNetwork, graph: str, config: tensorrt.IBuilderConfig, timings: CachedFile | None
) -> memoryview:
    library = parsed.library
    with collect_errors() as messages:
        if timings is not None:
            stored = config.create_timing_cache(timings.read() or b"")
            if not config.set_timing_cache(stored, ignore_mismatch=False):
                messages.why()  # from another driver: kernels are measured again
                config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
        plan = parsed.builder.build_serialized_network(parsed.network, config)
        if plan is None:
            raise Unavailable(
                f"{library.name_and_version} built no plan of graph '{graph}': {messages.why()}",
                next_step="give profiles= of fewer sizes, or use target='onnxruntime' or 'eager'",
            )
    if timings is not None:
        timings.write(memoryview(config.get_timing_cache().serialize()))
    return memoryview(plan)


def _builder_config(
    parsed: ParsedNetwork, ranges: SizeRanges, options: TensorRTOptions, capabilities: Sequence[str]
) -> tensorrt.IBuilderConfig:
    """Convert the target's options to the library's builder settings."""
    library, network = parsed.library, parsed.network
    trt = library.module
    config = parsed.builder.create_builder_config()
    profile = parsed.builder.create_optimization_profile()
    for value in (network.get_input(i) for i in range(network.num_inputs)):
        _refuse_shape_tensor(value)
        if DYNAMIC in tuple(value.shape):
            least, usual, most = zip(*((axis.least, axis.usual, axis.most) for axis in ranges[value.name]), strict=True)
            profile.set_shape(value.name, least, usual, most)
    config.add_optimization_profile(profile)
    flags = {
        trt.BuilderFlag.TF32: options.tf32,
        trt.BuilderFlag.STRICT_NANS: options.strict_nans,
        trt.BuilderFlag.WEIGHT_STREAMING: options.weight_streaming,
        refit_flag(library): options.refit,
    }
    for flag, wanted in flags.items():
        (config.set_flag if wanted else config.clear_flag)(flag)
    if library.is_rtx and options.cuda_graphs:  # else a context may allocate while it runs, and no graph captures that
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if options.builder_optimization_level is not None:
        config.builder_optimization_level = options.builder_optimization_level
    if options.hardware_compatibility is not None:
        levels = trt.HardwareCompatibilityLevel.__members__
        config.hardware_compatibility_level = levels[options.hardware_compatibility.upper()]
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace << _MIB)
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(capability_member(library, capability), index)
    return config


def _refuse_shape_tensor(value: tensorrt.ITensor) -> None:
    """Refuse an input whose values are sizes, since a plan would be built only for some of the values."""
    if value.is_shape_tensor:
        raise Unavailable(
            f"the model computes sizes from the values of input '{value.name}', which a plan does not support",
            next_step="give it as a plain number in example_inputs=, so that it is a constant of the program",
        )
