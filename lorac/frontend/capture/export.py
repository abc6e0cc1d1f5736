"""Capture: a host model becomes an ExportedProgram in which every call of a site is one ``lorac`` node.

The model is not modified: its ``Host`` copies the modules over the same storage, ``mark_sites`` makes the copy's sites
call their ops, and the copy's ``Host`` traces it.
"""

import contextlib
import functools
import inspect
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from lorac.errors import CaptureError, LoracError, OptionError, check_known, find_untested
from lorac.frontend.capture.attention_interface import (
    capture_attention,
    derive_decoder_arguments,
    make_decoder_inputs,
    make_decoder_shapes,
)
from lorac.frontend.capture.call_arguments import CallArguments
from lorac.frontend.capture.decoder_families import attend_densely, freeze_dynamic_rotary, get_longest_sequence
from lorac.frontend.capture.interface import describe_interface, find_input_paths
from lorac.frontend.capture.layer_groups import find_layer_groups
from lorac.frontend.capture.pipeline import capture_passes
from lorac.frontend.capture.recurrences import bind_mixers
from lorac.frontend.capture.repeated_layers import trace_repeated_layers_once
from lorac.frontend.capture.site_ops import SiteMarks, mark_sites
from lorac.frontend.capture.size_constraints import collect_constraints, collect_dynamic_axes, name_axes
from lorac.frontend.capture.trace_guards import (
    SizesTooComplex,
    TraceGuard,
    find_failing_model_line,
    find_failing_module,
    iter_error_causes,
    record_guards,
)
from lorac.frontend.copying import WeightCast, refuse_casts
from lorac.frontend.fast_path import FUSED_LAYERS, disable_fast_path, find_unfused_forward
from lorac.frontend.host import Host
from lorac.frontend.inputs.dynamic_shapes import (
    fix_hinted_axes,
    let_narrow,
    make_dynamic_shapes,
    repeat_unit_axes,
    repeat_unit_axes_of_inputs,
    spread_row_numbers,
)
from lorac.frontend.model_runner import preserve_random_state
from lorac.ir.calls.interface import Interface
from lorac.ir.calls.output_structure import replace_dataclasses
from lorac.ir.graph import ops as _ops  # noqa: F401  (registers the ops that a copy's sites call)
from lorac.ir.graph.graph import Graph, Level
from lorac.ir.graph.passes import Observer, run_pipeline
from lorac.ir.sites.site import Site, SiteKind
from lorac.ir.slots.plans import SitePlan, list_layers
from lorac.ir.slots.program_values import select_once_plans
from lorac.ir.traces.gate import tracing
from lorac.third_party_output import suppress_third_party_output


def export_model(
    host: Host,
    example_inputs: object = None,
    dynamic_shapes: object = None,
    marks: SiteMarks = SiteMarks(),  # noqa: B008  (frozen)
) -> tuple[ExportedProgram, list[TraceGuard], CallArguments]:
    """Trace a model in eval mode; return the program, the guards and the arguments.

    Each call of a site is one ``lorac`` node, whose last argument is the site's path. Each layer that repeats an
    earlier layer is one node.

    Args:
        host: the model; left unchanged.
        example_inputs: inputs for forward; None: they are made.
        dynamic_shapes: as ``torch.export`` takes them; None: batch, and length for sequences.
        marks: the parts of the model that become ops in addition to its sites.

    Raises:
        ExampleInputsNeeded: there are no inputs and none can be made.
        CaptureError: the model does not trace; the message names the line.
    """
    by_name = example_inputs is None or isinstance(example_inputs, Mapping) or host.by_name
    failures: list[CaptureError] = []
    bound = _bind_inputs(host, example_inputs)
    _check_shapes(bound, dynamic_shapes)
    for arguments in CallArguments.of(host, bound).iter_alternatives(host.model):
        try:
            inputs = arguments.inputs if by_name or arguments.fixed else example_inputs
            return _export_arguments(arguments, host, inputs, dynamic_shapes, marks)
        except CaptureError as error:
            failures.append(error)
        if not isinstance(failures[-1].__cause__, _ValuesNeeded):
            break
    raise failures[0]


def _export_arguments(
    arguments: CallArguments, host: Host, inputs: Any, dynamic_shapes: object, marks: SiteMarks
) -> tuple[ExportedProgram, list[TraceGuard], CallArguments]:
    from torch._dynamo import config

    # A cache of symbolic shapes costs more time than computing each op's shapes again.
    uncached = config.patch(fake_tensor_cache_enabled=False)
    with isolate_tracing(host.model), disable_fast_path(host.model), uncached, contextlib.ExitStack() as stack:
        copied = _make_marked_copy(host, marks, arguments)
        if marks.attention:
            copied.model.forward = derive_decoder_arguments(copied.model.forward)
            freeze_dynamic_rotary(copied.model)
            attend_densely(copied.model)
            stack.enter_context(capture_attention(copied, arguments.inputs))
        if dynamic_shapes is None:
            # Constants for each row contradict a batch that is widened from one row to two.
            attempts: Iterable[tuple[object, object]] = _attempts(host, inputs, widen=not arguments.read)
        else:
            values = repeat_unit_axes_of_inputs(host, inputs, dynamic_shapes)
            shapes = dynamic_shapes
            if arguments.fixed:
                by_name = host.bind(dynamic_shapes)
                shapes = {name: by_name.get(name) for name in arguments.inputs}
            attempts = [(values, shapes), (values, let_narrow(shapes))]
        program, guards = _first_trace(copied, attempts, narrows=dynamic_shapes is None)
    return program, guards, arguments


def _check_shapes(inputs: Mapping[str, Any], shapes: object) -> None:
    """Raise ``OptionError`` for shapes of unknown inputs, and for axes that are texts."""
    if isinstance(shapes, Mapping):
        check_known(shapes, inputs, "dynamic_shapes= has the name of no example input,")
    if text := next((axis for axis in pytree.tree_leaves(shapes) if isinstance(axis, str)), None):
        step = f"write torch.export.Dim('{text}'), or Dim.AUTO for the sizes that the model admits"
        raise OptionError(f"dynamic_shapes= has the text '{text}' for an axis", next_step=step)


def _bind_inputs(host: Host, example: object) -> dict[str, Any]:
    try:
        return host.bind(example)
    except TypeError as error:
        raise CaptureError(
            f"{type(host.model).__name__} cannot be called with its example inputs: {error}",
            next_step="give example_inputs= as the model itself is called",
        ) from error


@contextlib.contextmanager
def isolate_tracing(model: nn.Module) -> Iterator[None]:
    """Trace or run a copy of a model inside the block, without gradients, output or changes of random states."""
    with (
        tracing(),
        suppress_third_party_output(),
        torch.no_grad(),
        preserve_random_state(model),
    ):
        yield


def _make_marked_copy(host: Host, marks: SiteMarks, arguments: CallArguments) -> Host:
    """Return a structural copy for tracing, whose sites and blocks call ops and whose constant arguments are bound."""
    copied = host.copy(share_buffers=True)
    model = copied.model.eval()
    alike = find_layer_groups(model)
    for module in model.modules():
        if isinstance(module, FUSED_LAYERS):
            module.forward = find_unfused_forward(module)  # type: ignore[method-assign]  # of a copy
    if marks.attention:
        bind_mixers(model)
    mark_sites(model, marks)
    refuse_casts(model)
    trace_repeated_layers_once(model, alike, [path.removeprefix(marks.prefix) for path in marks.blocks])
    forward, constants = model.forward, arguments.trace_constants

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            with arguments.apply_in_trace():
                return replace_dataclasses(forward(*args, **constants, **kwargs))
        except GuardOnDataDependentSymNode as error:
            raise _ValuesNeeded(str(error)).with_traceback(error.__traceback__) from error

    signature = inspect.signature(forward)
    parameters = {name: parameter for name, parameter in signature.parameters.items() if name not in constants}
    variadic = [name for name, parameter in parameters.items() if parameter.kind is parameter.VAR_KEYWORD]
    if variadic:  # torch.export needs a parameter for each input that has a dynamic shape
        others = [name for name in arguments.inputs if name not in parameters]
        keywords = parameters.pop(variadic[0])
        parameters |= {name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in others}
        parameters[variadic[0]] = keywords
    call.__signature__ = signature.replace(parameters=list(parameters.values()))  # type: ignore[attr-defined]  # functions take attributes
    model.forward = call
    return copied


def _first_trace(
    host: Host, attempts: Iterable[tuple[object, object]], *, narrows: bool
) -> tuple[ExportedProgram, list[TraceGuard]]:
    """Return the trace of the first attempt that succeeds; try the next only after a failure about shapes.

    Args:
        host: a marked copy.
        attempts: inputs and shapes.
        narrows: whether later attempts may fix an axis, and so succeed if the first attempt fails on a fixed axis.
    """
    forward = host.model.forward
    for inputs, shapes in attempts:
        guards: list[TraceGuard] = []
        host.model.forward = record_guards(forward, guards, bounded=not narrows)
        try:
            return host.trace(inputs, shapes), guards
        except LoracError:
            raise
        except Exception as error:
            cause = error
        finally:
            host.model.forward = forward
        fixed = fix_hinted_axes(shapes)
        if isinstance(cause, SizesTooComplex) and fixed != shapes:
            program, guards = _first_trace(host, [(inputs, fixed)], narrows=narrows)
            return program, [*guards, cause.guard]
        if not _is_about_shapes(cause) or not (narrows or _FIXED not in str(cause)):
            break
    raise _trace_error(host.model, guards, cause) from cause


def capture_graph(  # noqa: PLR0913  (what a graph is made of)
    name: str,
    host: Host,
    inputs: object,
    dynamic_shapes: object,
    *,
    sites: Mapping[str, Site],
    plans: Mapping[str, SitePlan],
    blocks: Collection[str] = (),
    prefix: str = "",
    grows: bool = False,
    observe: Observer | None = None,
) -> Graph:
    """Capture a model as a graph at level host.

    Args:
        host, inputs, dynamic_shapes: as ``export_model`` takes them.
        blocks: paths of modules whose outputs become ops too.
        prefix: prefix of the paths of modules and tensors, if the model is one of several components.
        sites, plans: sites and plans of the model; the graph keeps the plans for this component.
        grows: whether the sequence grows in a cache: attention becomes ops, and inputs are those of
            ``make_decoder_inputs``.
        observe: as ``run_pipeline`` takes it.
    """
    inputs, dynamic_shapes = spread_row_numbers(host, inputs, dynamic_shapes)
    if grows:
        inputs = make_decoder_inputs(host, _bind_inputs(host, inputs))
        dynamic_shapes = make_decoder_shapes(host, inputs)
    layers = [path for path in list_layers(plans.values()) if path.startswith(prefix)]
    marks = SiteMarks(prefix, blocks, layers, attention=grows)
    exported, guards, arguments = export_model(host, inputs, dynamic_shapes, marks)
    named = arguments.inputs
    shapes = make_dynamic_shapes(host, named) if dynamic_shapes is None else host.bind(dynamic_shapes)
    signature = {
        path: plan for path, plan in plans.items() if path.startswith(prefix) and plan.site.kind is not SiteKind.ONCE
    }
    signature |= select_once_plans(plans, signature)
    graph = Graph(name, exported, sites, signature, Interface(), level=Level.TRACED)
    graph.longest = get_longest_sequence(host.model) if grows else None
    passes = capture_passes(prefix, tuple(arguments.truths), attention=grows, model=type(host.model).__name__)
    run_pipeline(graph, passes, observe, first="trace")
    inputs_by_path = find_input_paths(graph.exported, host)
    requested = [(inputs_by_path.get(path, path), axis) for path, axis in collect_dynamic_axes(named, shapes)]
    sizes = collect_constraints(exported, requested, guards)
    graph.axes = name_axes(exported, {inputs_by_path.get(path, path): shape for path, shape in shapes.items()})
    graph.interface = describe_interface(graph, host, arguments, inputs_by_path, sizes)
    graph.describe_types()
    return graph


def _attempts(host: Host, inputs: Any, *, widen: bool) -> Iterator[tuple[object, object]]:
    """Yield the inputs and default shapes to try: first named dims, then dims that torch may narrow or fix.

    Args:
        host: the model.
        inputs: by name or in order.
        widen: whether one row may become two.
    """
    named = isinstance(inputs, Mapping)
    example = dict(inputs) if named else {str(i): value for i, value in enumerate(inputs)}
    for names in host.named_sizes:
        shapes = make_dynamic_shapes(host, example, named=names)
        values = {name: repeat_unit_axes(value, shapes[name]) if widen else value for name, value in example.items()}
        yield (values, shapes) if named else (tuple(values.values()), tuple(shapes.values()))


class _ValuesNeeded(Exception):
    """An error that replaces torch's error for a step that depends on the values of tensors.

    torch.export prints the whole graph before it raises its own error, which cannot be disabled.
    """


_FIXED = "your code specialized it to be a constant"
"""Part of torch's message about an axis that the shapes declare as dynamic and the model fixes."""
_NO_ADVICE = "Expected op to be '=='"
"""Beginning of torch's message if it cannot phrase its advice on shapes, for a bound such as 18/5 <= batch."""


def _is_about_shapes(error: BaseException) -> bool:
    """Return whether the model traced, but not for every size that the dynamic shapes declare."""
    return any(
        type(e).__name__ in ("ConstraintViolationError", "UserError") or str(e).startswith(_NO_ADVICE)
        for e in iter_error_causes(error)
    )


def _trace_error(host: nn.Module, guards: Sequence[TraceGuard], error: Exception) -> CaptureError:
    line, module = find_failing_model_line(error), find_failing_module(error)
    reason = textwrap.shorten(str(error).strip().partition("\n")[0], 240, placeholder=" …") or type(error).__name__
    step = (
        "make this line independent of the values of tensors (torch.where), give forward the value that it computes "
        "there (such as position_ids), compile a part without it (model.backbone), or use target='eager'"
    )
    if line is None and guards:
        line, module = guards[0].line, guards[0].module
    if _is_about_shapes(error):
        reason = " ".join(str(error).partition("The error above")[0].split())
        step = "give dynamic_shapes= that this line admits, or change the line"
        if line is None:
            step = "give dynamic_shapes= by the names of the inputs, as torch.export takes them"
    elif isinstance(error, SizesTooComplex):
        step = (
            "give dynamic_shapes= with Dim.AUTO or without these axes, which fixes them; target='eager' takes any size"
        )
    elif isinstance(error, WeightCast):
        step = "call the model once before compiling, which casts its weights; target='eager' needs no such call"
    elif not isinstance(error, _ValuesNeeded | GuardOnDataDependentSymNode):
        step = find_untested() or "target='eager' runs the model itself"
    path = next((path for path, other in host.named_modules() if other is module), "")
    where = (f" at {line}" if line else "") + (f", in '{path}'" if path else "")
    return CaptureError(
        f"torch.export cannot trace {type(host).__name__}{where}: {reason}",
        next_step=step,
    )
