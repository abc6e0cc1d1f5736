"""Conversion of a torch.export program to an ONNX model, with the result of torch's exporter.

``torch.onnx.export`` parses the source of its 500 translations for every program, traces the program again to decompose
ops even if there are none to decompose, and records nodes in global variables. The modules ``torchlib``,
``type_promotion`` and ``graph_translation`` avoid all three, for the releases of torch that they were tested with; for
other releases lorac calls the exporter unchanged.
"""

import traceback
from collections.abc import Mapping

import onnx_ir as ir
import torch
from torch import fx
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.onnx.errors import OnnxExporterError

from lorac.backends.onnx.export.torchlib import Target, Translation
from lorac.errors import Unavailable
from lorac.frontend.capture.trace_guards import iter_error_causes
from lorac.ir.graph.edit import copy_graph, find_fake_mode
from lorac.ir.graph.nodes import find_module_path, find_source_line
from lorac.ir.traces.gate import tracing
from lorac.third_party_output import suppress_third_party_output

TESTED_RELEASES = ("2.13",)
"""Releases of torch whose private parts ``torchlib`` was tested with."""
Translations = Mapping[Target, Translation]


def export(program: ExportedProgram, translations: Translations) -> ir.Model:
    """Convert a program as torch's exporter does, without any clean-up.

    Args:
        program: the program, which is not modified.
        translations: op -> translation to ONNX, which takes precedence over torch's own.

    Raises:
        Unavailable: an op has no translation.
    """
    is_tested = torch.__version__.startswith(TESTED_RELEASES)
    with tracing(), suppress_third_party_output(), torch.no_grad():
        return (_translate if is_tested else _export_with_torch)(program, translations)


def _export_with_torch(program: ExportedProgram, translations: Translations) -> ir.Model:
    try:
        exported = torch.onnx.export(
            program, dynamo=True, optimize=False, verbose=False, custom_translation_table=dict(translations)
        )
    except OnnxExporterError as error:
        raise _translation_error(error, _find_failing_node(error)) from error
    assert exported is not None
    return exported.model


def _translate(program: ExportedProgram, translations: Translations) -> ir.Model:
    from lorac.backends.onnx.export import graph_translation, torchlib, type_promotion

    try:
        if torchlib.is_functional(program):
            calls = torchlib.find_untranslated(program, translations)
            program = torchlib.decompose_calls(program, translations, calls) if calls else program
            graphs = {"": copy_graph(program.graph)}
        else:
            program = torchlib.decompose(program, translations)
            modules = program.graph_module.named_modules(remove_duplicate=False)
            graphs = {path: module.graph for path, module in modules if isinstance(module, fx.GraphModule)}
        for graph in graphs.values():
            type_promotion.insert_casts(graph, find_fake_mode(program))
        return graph_translation.translate(program, graphs, translations)
    except graph_translation.TranslationFailed as error:
        raise _translation_error(error, error.node) from error
    except Exception as error:  # a decomposition may raise any exception
        raise _translation_error(error, _find_failing_node(error)) from error


def _translation_error(error: BaseException, node: fx.Node | None) -> Unavailable:
    """Return the error for a program that cannot be converted, with the model's line that calls the op."""
    reasons = [str(e).strip() for e in iter_error_causes(error)]
    missing = any(_MISSING_MESSAGE in reason for reason in reasons)
    reason = next((text.splitlines()[0] for text in reversed(reasons) if text), type(error).__name__)
    line = None if node is None else find_source_line(node)
    op, target = "the program", None if node is None else node.target
    if target is not None:
        op = target.name() if isinstance(target, OpOverload) else getattr(target, "__name__", str(target))
    path = "" if node is None else find_module_path(node)
    asks = f"'{path}' asks for, at {line}" if path else f"{line} asks for"
    return Unavailable(
        (f"ONNX has no op for {op}" if missing else f"ONNX cannot hold {op}")
        + (f", which {asks}" if line else "")
        + ("" if missing else f": {reason}"),
        next_step="use target='eager', or another implementation of that part of the model",
    )


_MISSING_MESSAGE = "No ONNX function found"
"""Text of torch's error for an op without a translation."""


def _find_failing_node(error: BaseException) -> fx.Node | None:
    """Return the op that torch was processing when it raised, which may come from a decomposition."""
    errors = reversed(list(iter_error_causes(error)))
    frames = (frame for e in errors for frame, _ in reversed(list(traceback.walk_tb(e.__traceback__))))
    names = (value for frame in frames if frame.f_code.co_filename != __file__ for value in frame.f_locals.values())
    nodes = (value for value in names if isinstance(value, fx.Node))
    return next((node for node in nodes if isinstance(node.target, OpOverload)), None)
