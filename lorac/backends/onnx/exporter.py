"""torch's ONNX exporter as it is called here: quiet, and without the four things that take it longest.

For every export it parses the source of its 500 translations, of which a program needs some ten, traces the whole
program anew to decompose ops, even where there are none to decompose, computes the shape of every value anew to see
which operands are to be cast, and reads what an op of ONNX takes for each node anew. All four are replaced while it
runs; the result is the same.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.schemas import OpSignature
from torch import fx
from torch.export import ExportedProgram
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.onnx._internal.exporter import _fx_passes
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.onnx._internal.fx.passes.type_promotion import _TypePromotionInterpreter, get_type_promotion_rule
from torch.onnx.errors import OnnxExporterError

from lorac.errors import Unavailable
from lorac.frontend.trace_guards import iter_error_causes
from lorac.ir.graph.edit import find_source_line
from lorac.third_party_output import suppress_third_party_output

_ONE_AT_A_TIME = threading.Lock()
_whole_of_library = ONNXRegistry.from_torchlib
_whole_registry = functools.cache(_whole_of_library)
_read_signature = OpSignature.from_op_schema


def export(program: ExportedProgram, translations: Mapping[Callable[..., Any], Callable[..., Any]]) -> ir.Model:
    """The program as torch's exporter writes it, before any clean-up.

    Args:
        program: what to export.
        translations: op -> its ONNX, before torch's own.

    Raises:
        Unavailable: an op has no translation.
    """
    with _ONE_AT_A_TIME, suppress_third_party_output(), _without_repetition(), torch.no_grad():
        try:
            found = torch.onnx.export(
                program, dynamo=True, optimize=False, verbose=False, custom_translation_table=dict(translations)
            )
        except OnnxExporterError as error:
            raise _translation_error(error) from error
    assert found is not None
    return found.model


def _translation_error(error: BaseException) -> Unavailable:
    """The error for a program that torch's exporter cannot write, with the line of the model that asks for it."""
    node = next(filter(None, map(_find_failing_node, reversed(list(iter_error_causes(error))))), None)
    reasons = [str(e).strip() for e in iter_error_causes(error)]
    missing = any(_MISSING_MESSAGE in reason for reason in reasons)
    reason = next((text.splitlines()[0] for text in reversed(reasons) if text), type(error).__name__)
    line = None if node is None else find_source_line(node)
    op = "the program" if node is None else node.target.name()  # type: ignore[union-attr]  # an op
    return Unavailable(
        (f"ONNX has no op for {op}" if missing else f"ONNX cannot hold {op}")
        + (f", which {line} asks for" if line else "")
        + ("" if missing else f": {reason}"),
        next_step="target='eager' runs it; another implementation of that part of the model may be exported",
    )


_MISSING_MESSAGE = "No ONNX function found"
"""What torch's exporter says of an op that it has no translation for."""


def _find_failing_node(error: BaseException) -> fx.Node | None:
    """The op that torch's exporter was at, which its errors do not carry; it may be a part of one of the program's."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename != __file__)
    nodes = [value for frame in frames for value in frame.f_locals.values() if isinstance(value, fx.Node)]
    return next((node for node in reversed(nodes) if isinstance(node.target, torch._ops.OpOverload)), None)


@contextlib.contextmanager
def _without_repetition() -> Iterator[None]:
    own_registry, own_decompose = vars(ONNXRegistry)["from_torchlib"], _fx_passes.decompose_with_registry
    own_run, signature = _TypePromotionInterpreter.run_node, vars(OpSignature)["from_op_schema"]

    def registry(_: type[ONNXRegistry], /, **options: Any) -> ONNXRegistry:
        return _LazyRegistry(**options)

    def decompose(exported_program: ExportedProgram, registry: ONNXRegistry) -> ExportedProgram:
        if _has_translations(exported_program, registry):
            return _copy_graph(exported_program)
        assert isinstance(registry, _LazyRegistry)
        registry.fill()
        return own_decompose(exported_program, registry)

    ONNXRegistry.from_torchlib = classmethod(registry)  # type: ignore[method-assign, assignment]  # for as long as this runs
    _fx_passes.decompose_with_registry = decompose
    _TypePromotionInterpreter.run_node = _promoted  # type: ignore[method-assign, assignment]  # likewise
    OpSignature.from_op_schema = staticmethod(_signature_of)  # type: ignore[method-assign, assignment]  # likewise
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = own_registry  # type: ignore[method-assign]  # put back
        _fx_passes.decompose_with_registry = own_decompose
        _TypePromotionInterpreter.run_node = own_run  # type: ignore[method-assign]  # put back
        OpSignature.from_op_schema = signature  # type: ignore[method-assign]  # put back


class _LazyRegistry(ONNXRegistry):
    """torch's translations, each looked up when an op asks for it.

    Args:
        options: what torch's own is made with.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._options = options
        self._opset_version = options.get("opset_version", self._opset_version)

    def get_decomps(self, target: Any) -> Any:
        """As torch's own, where it was made of all."""
        self._ask(target)
        return super().get_decomps(target)

    def fill(self) -> None:
        """Have all there are: ops that have none are decomposed into any of them."""
        for op, found in _whole_registry(**self._options).functions.items():
            self.functions.setdefault(op, list(found))

    def _register(self, target: Any, onnx_decomposition: Any) -> None:
        self._ask(target)
        super()._register(target, onnx_decomposition)

    def _ask(self, target: Any) -> None:
        key = target.name() if isinstance(target, torch._ops.OpOverload) else target
        found = _registry_of(_torchlib_name(target), **self._options).functions.get(key)
        if found is not None and key not in self.functions:
            self.functions[key] = list(found)


@functools.cache
def _registry_of(name: str, **options: Any) -> ONNXRegistry:
    """What torch registers where its library has translations of one op alone, by the library's name for it."""
    from onnxscript.function_libs.torch_lib import ops, registration  # noqa: F401  (ops fill the registry)

    library: Any = registration
    whole = library.default_registry
    library.default_registry = {found: own for found, own in whole.items() if _base_name(found) == _base_name(name)}
    try:
        return _whole_of_library(**options)
    finally:
        library.default_registry = whole


def _base_name(name: str) -> str:
    """A name without what torch's library adds to some: of the default overload, and of Python's operators."""
    return name.removesuffix(".default").replace("__", "")


def _torchlib_name(target: Any) -> str:
    """An op or a function of Python's own as torch's library names it."""
    return target.name() if isinstance(target, torch._ops.OpOverload) else f"{target.__module__}::{target.__name__}"


def _promoted(interpreter: _TypePromotionInterpreter, node: fx.Node, /) -> Any:
    """What a node computes, its operands cast as torch casts them: what it was traced with, where that is known."""
    rule = get_type_promotion_rule(node, interpreter.type_promotion_table)
    if rule is not None:
        with interpreter._set_current_node(node):
            interpreter._maybe_promote_node(node, rule)
    known = node.op == "call_function" and "val" in node.meta
    return node.meta["val"] if known else fx.Interpreter.run_node(interpreter, node)


def _signature_of(schema: onnx.defs.OpSchema) -> OpSignature:
    """What an op takes and gives, read once where it is ONNX's own, of which there is one by a name and a version."""
    return _read_signature(schema) if schema.domain else _signature(schema.name, schema.since_version)


@functools.cache
def _signature(name: str, version: int) -> OpSignature:
    return _read_signature(onnx.defs.get_schema(name, version))


def _has_translations(program: ExportedProgram, registry: ONNXRegistry) -> bool:
    """Whether every op has a translation and none writes in place or runs a graph of its own."""
    ops = {node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    known = all(registry.is_registered(op) and not op._schema.is_mutable for op in ops)
    return known and not any(node.op == "get_attr" for node in program.graph.nodes)


def _copy_graph(program: ExportedProgram) -> ExportedProgram:
    """The program with a graph of its own, for the exporter edits the one it is given; its code is never written."""
    copied, module = copy.copy(program), program.graph_module
    graph = copy.deepcopy(module.graph)
    for node, original in zip(graph.nodes, module.graph.nodes, strict=True):
        node.name = original.name  # an input called as a builtin is, "input", is given another in a copy
    copied._graph_module = _LazyGraphModule(module, graph)
    return copied
