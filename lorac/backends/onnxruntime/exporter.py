"""torch's ONNX exporter as it is called here: quiet, and without the two things that take it longest.

For every export it parses the source of its 500 translations, and traces the whole program anew to decompose ops, even
where there are none to decompose. Both are replaced while it runs; the result is the same.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.onnx._internal.exporter import _fx_passes
from torch.onnx._internal.exporter._registration import ONNXRegistry

_ONE_AT_A_TIME = threading.Lock()
_whole_registry = functools.cache(ONNXRegistry.from_torchlib)


def export(program: ExportedProgram, translations: Mapping[Callable[..., Any], Callable[..., Any]]) -> ir.Model:
    """The program as torch's exporter writes it, before any clean-up.

    Args:
        program: what to export.
        translations: op -> its ONNX, before torch's own.
    """
    with _ONE_AT_A_TIME, quiet(), _without_repetition(), torch.no_grad():
        found = torch.onnx.export(
            program, dynamo=True, optimize=False, verbose=False, custom_translation_table=dict(translations)
        )
    assert found is not None
    return found.model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporter warns of its own deprecations and logs what it skips; neither is the user's to act on."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def _without_repetition() -> Iterator[None]:
    own_registry, own_decompose = vars(ONNXRegistry)["from_torchlib"], _fx_passes.decompose_with_registry

    def registry(_: type[ONNXRegistry], /, **options: Any) -> ONNXRegistry:
        made = copy.copy(_whole_registry(**options))
        made.functions = {op: list(found) for op, found in made.functions.items()}
        return made

    def decompose(exported_program: ExportedProgram, registry: ONNXRegistry) -> ExportedProgram:
        translated = _is_translated(exported_program, registry)
        return _copied(exported_program) if translated else own_decompose(exported_program, registry)

    ONNXRegistry.from_torchlib = classmethod(registry)  # type: ignore[method-assign, assignment]
    _fx_passes.decompose_with_registry = decompose
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = own_registry  # type: ignore[method-assign]
        _fx_passes.decompose_with_registry = own_decompose


def _is_translated(program: ExportedProgram, registry: ONNXRegistry) -> bool:
    """Whether every op has a translation and none writes in place or runs a graph of its own."""
    ops = {node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    known = all(op.name() in registry.functions and not op._schema.is_mutable for op in ops)
    return known and not any(node.op == "get_attr" for node in program.graph.nodes)


def _copied(program: ExportedProgram) -> ExportedProgram:
    """The program with a graph of its own, for the exporter edits the one it is given."""
    copied, module = copy.copy(program), program.graph_module
    graph = copy.deepcopy(module.graph)
    for node, original in zip(graph.nodes, module.graph.nodes, strict=True):
        node.name = original.name  # an input called as a builtin is, "input", is given another in a copy
    copied._graph_module = fx.GraphModule(module, graph)
    return copied
