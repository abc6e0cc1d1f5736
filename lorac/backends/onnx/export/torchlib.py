"""torch's translations of ops to ONNX, run without effects on other threads.

The translations of torch and onnxscript record nodes in global variables, ``onnxscript.evaluator.default()`` and
``torch.onnx._internal.exporter._core.current_tracer``, so one thread's export may record the ops of another. Therefore
this module runs their code over copies of their modules' namespaces, in which every opset records for the calling
context (``opsets``). The libraries' own objects are not modified.

Only this module imports the private parts of torch that emission needs, and ``tests/backends/onnx/test_torchlib.py``
tests their behaviour. They become unnecessary once both variables are context variables upstream, and once
``torch.onnx.export`` reads only the signatures of translations that a program needs, and does not trace a program again
if it decomposes nothing.
"""

import functools
import math
import operator
import types
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import onnx
import onnx_ir as ir
import torch
from onnx_ir.schemas import OpSignature
from onnxscript import OnnxFunction
from onnxscript.function_libs.torch_lib import ops as _ops  # noqa: F401  (importing it fills the registry)
from onnxscript.function_libs.torch_lib.registration import default_registry
from onnxscript.values import Opset, TracedOnnxFunction
from torch import fx
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx.experimental import _config
from torch.fx.node import Argument
from torch.onnx._internal.exporter import _building, _core, _decomp, _registration, _schemas
from torch.onnx._internal.exporter._tensors import SymbolicTensor
from torch.onnx._internal.exporter._torchlib._torchlib_registry import get_torchlib_ops
from torch.onnx._internal.fx.passes.type_promotion import (
    TypePromotionSnapshot,
    TypePromotionTable,
    find_compatible_op_overload,
    get_type_promotion_rule,
)

from lorac.backends.onnx.export.cells import CELLS
from lorac.backends.onnx.export.opsets import Outputs, RecordingOpset, current_recorder, rebind
from lorac.ir.graph.edit import copy_program, inline, trace_function, update_signature
from lorac.ir.traces.functions import Decompositions

__all__ = [
    "OPSET",
    "TENSOR_OPSET",
    "TORCHLIB_OPSET",
    "Recorder",
    "SymbolicTensor",
    "Target",
    "Translation",
    "TypePromotionSnapshot",
    "TypePromotionTable",
    "decompose",
    "decompose_calls",
    "find_compatible_op_overload",
    "find_translation",
    "find_untranslated",
    "get_type_promotion_rule",
    "is_functional",
]

OPSET = 20
"""The version of ONNX that ``torch.onnx.export`` writes by default, and this emitter too."""
TORCHLIB_OPSET = 18
"""The version that most translations write; a program is converted from it to ``OPSET``."""
TENSOR_OPSET = RecordingOpset(Opset("", OPSET))
"""The opset of operators between tensors, such as ``x * y`` in a translation."""
AnyFunction = OnnxFunction[..., Any]
"""A function that onnxscript compiled."""
_LIBRARIES = ("onnxscript.function_libs.torch_lib.ops", "torch.onnx._internal.exporter._torchlib.ops")
"""Packages of translations."""

Target = Callable[..., object]
"""Target of an fx node: an op's overload or a Python function."""
Translation = Callable[..., Outputs]


class Recorder(_building.OpRecorder):
    """A recorder of one graph's nodes, which works as torch's own but reads the signature of each op once.

    Equal constants and sizes are recorded once; otherwise a third of a program's nodes would be copies of them.
    """

    def __init__(self) -> None:
        super().__init__(TENSOR_OPSET, {})  # type: ignore[arg-type]  # stands for an Opset
        self._sizes: dict[object, ir.Value] = {}
        self._size_values: set[object] = set()

    def record(self, schema: onnx.defs.OpSchema, /, *inputs: object, **attributes: object) -> Outputs:
        """Record a node, or find an equal constant or size; return its outputs."""
        if schema.name not in _SIZE_OPS or (schema.name == "Concat" and not self._size_values.issuperset(inputs)):
            return self._write(schema, *inputs, **attributes)
        facts: list[object] = [schema.name, inputs]
        for name, value in attributes.items():
            if not isinstance(value, ir.Tensor):  # as text, since -0.0 and 0.0 compare equal
                facts += () if value is None else (name, repr(list(value) if isinstance(value, tuple) else value))
            elif value.size <= _LARGEST_SHARED:
                facts += (name, value.dtype, *value.shape, value.tobytes())
            else:
                return self._write(schema, *inputs, **attributes)
        key = tuple(facts)
        if key not in self._sizes:
            size = self._write(schema, *inputs, **attributes)
            assert isinstance(size, ir.Value)
            self._sizes[key] = size
            self._size_values.add(size)
        return self._sizes[key]

    def _write(self, schema: onnx.defs.OpSchema, /, *inputs: object, **attributes: object) -> Outputs:
        key = schema.domain, schema.name, schema.since_version
        if key not in _SIGNATURES:
            _SIGNATURES[key] = OpSignature.from_op_schema(schema)
        signature = _SIGNATURES[key]
        named, settings = _building._construct_named_inputs_and_attrs(signature, inputs, attributes)  # type: ignore[arg-type]  # torch's to check
        if isinstance(
            body := attributes.get("body", attributes.get("then_branch")), ir.Graph
        ):  # outputs vary in number
            count = len(body.outputs)
        else:
            count = _building._determine_output_number(signature, settings)
        typed: dict[str, object] = dict(settings)
        for name, value in settings.items():  # onnx_ir infers these types last, after slow protocol checks
            kinds = {type(element) for element in value} if isinstance(value, list | tuple) else set[type]()
            if isinstance(value, ir.Tensor):
                typed[name] = ir.AttrTensor(name, value)
            elif len(kinds) == 1 and (kind := _LIST_TYPES.get(kinds.pop())) is not None:
                typed[name] = ir.convenience.convert_attribute(name, value, kind)
        return _unpack(self._call_op(signature, named, typed, count))  # type: ignore[arg-type]  # onnx_ir takes both

    def record_call(self, function: AnyFunction, /, *inputs: object, **attributes: object) -> Outputs:
        """Record a call of a function that onnxscript compiled."""
        signature = _read_function_signature(function)
        named, settings = _building._construct_named_inputs_and_attrs(signature, inputs, attributes)  # type: ignore[arg-type]  # torch's to check
        self.functions[(function.function_ir.domain, function.name, "")] = function
        return _unpack(self._call_op(signature, named, settings, len(signature.outputs)))

    def take_nodes(self) -> list[ir.Node]:
        """Return the nodes that were recorded since the last call of this method."""
        nodes, self.nodes = self.nodes, []
        return nodes


_SIZE_OPS = frozenset({"Constant", "Shape", "Concat"})
"""Ops of constants and sizes; a concatenation is one of sizes if all its inputs are."""
_LARGEST_SHARED = 16
"""Elements up to which a tensor is compared with others."""
_LIST_TYPES = {int: ir.AttributeType.INTS, float: ir.AttributeType.FLOATS, str: ir.AttributeType.STRINGS}


def _unpack(outputs: Sequence[ir.Value]) -> Outputs:
    return outputs[0] if len(outputs) == 1 else outputs


_SIGNATURES: dict[tuple[str, str, int], OpSignature] = {}


@functools.cache
def _read_function_signature(function: AnyFunction) -> OpSignature:
    return _schemas.op_signature_from_function(
        function, function.function_ir.domain, function.name, since_version=function.opset.version
    )


def find_untranslated(program: ExportedProgram, translations: Mapping[Target, Translation]) -> list[fx.Node]:
    """Return the calls of ops without a translation."""
    library = _read_library()
    calls = (node for node in program.graph.nodes if isinstance(node.target, OpOverload))
    return [node for node in calls if node.target not in translations and _key(node.target) not in library]


def is_functional(program: ExportedProgram) -> bool:
    """Return whether no op writes in place or runs a subgraph."""
    ops = {node.target for node in program.graph.nodes if isinstance(node.target, OpOverload)}
    return not any(op._schema.is_mutable for op in ops) and all(n.op != "get_attr" for n in program.graph.nodes)


def find_translation(node: fx.Node, translations: Mapping[Target, Translation]) -> Translation | None:
    """Return the translation of a node that torch's exporter would choose.

    Args:
        node: a call of the op.
        translations: op -> translation, which takes precedence over the libraries'.
    """
    examples = [operand.meta.get("val") for operand in node.all_input_nodes]
    is_complex = any(isinstance(value, torch.Tensor) and value.is_complex() for value in examples)
    if not is_complex and callable(node.target) and node.target in translations:
        return translations[node.target]
    candidates = _read_library().get(_key(node.target), ())
    return next((_detach(found) for found, for_complex in candidates if for_complex == is_complex), None)


def decompose(program: ExportedProgram, translations: Mapping[Target, Translation]) -> ExportedProgram:
    """Trace a program again, and decompose its ops without a translation."""
    with _config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]  # it is a ConfigModule
        decomposed = program.run_decompositions(_make_decompositions(translations))
    for module in decomposed.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            _restore_transforms(module.graph)
    return decomposed


def decompose_calls(
    program: ExportedProgram, translations: Mapping[Target, Translation], calls: Sequence[fx.Node]
) -> ExportedProgram:
    """Return a copy of a program with the given calls of functional ops decomposed; nothing else is traced."""
    program = copy_program(program)
    names = {call.name for call in calls}
    decompositions = _make_decompositions(translations)

    def run(
        function: Callable[..., object], node: fx.Node, operands: Sequence[fx.Node], *values: Argument
    ) -> tuple[object, ...]:
        known = dict(zip(operands, values, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        result = function(*args, **kwargs)
        return tuple(result) if isinstance(result, tuple | list) else (result,)

    for node in [node for node in program.graph.nodes if node.name in names]:
        if not node.users:
            program.graph.erase_node(node)
            continue
        operands = node.all_input_nodes
        rule = decompositions[node.target] if node.target in _UNROLLED else CELLS.get(node.target, node.target)
        call = functools.partial(run, rule, node, operands)
        traced = trace_function(program, call, operands, decompositions)
        _restore_transforms(traced.graph)
        _, results = inline(program, node, traced, operands, traced)
        if not isinstance(node.meta["val"], tuple | list):
            node.replace_all_uses_with(results[0])
        for part in list(node.users):  # of several outputs
            index = part.args[1]
            assert isinstance(index, int)
            part.replace_all_uses_with(results[index])
            part.graph.erase_node(part)
        program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    update_signature(program)
    return program


def _change_last_size(x: torch.Tensor, dim: Sequence[int], size: int) -> list[int]:
    """Return the sizes of x with another size on the last of the transformed axes."""
    return [size if axis == dim[-1] % x.dim() else old for axis, old in enumerate(x.shape)]


_TRANSFORMS: Mapping[OpOverload, Callable[..., torch.Tensor]] = {
    torch.ops.aten._fft_c2c.default: lambda x, dim, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    torch.ops.aten._fft_r2c.default: lambda x, dim, _, onesided: x.new_empty(
        _change_last_size(x, dim, x.shape[dim[-1]] // 2 + 1 if onesided else x.shape[dim[-1]]),
        dtype=x.dtype.to_complex(),
    ),
    torch.ops.aten._fft_c2r.default: lambda x, dim, _, last: x.new_empty(
        _change_last_size(x, dim, last), dtype=x.dtype.to_real()
    ),
}
"""Fourier transform -> a function that makes its result without values; torch's own fixes sizes to the example's."""


def _define_stand_in(transform: OpOverload) -> OpOverload:
    """Define an op that stands in for a Fourier transform in traces."""
    name = f"lorac::stands_for{transform._schema.name.partition('::')[2]}"
    torch.library.define(name, "(" + str(transform._schema).partition("(")[2])
    torch.library.register_fake(name, _TRANSFORMS[transform])
    return getattr(torch.ops.lorac, name.partition("::")[2]).default


_STAND_INS = {transform: _define_stand_in(transform) for transform in _TRANSFORMS}


def _restore_transforms(graph: fx.Graph) -> None:
    for transform, stand_in in _STAND_INS.items():
        for node in graph.find_nodes(op="call_function", target=stand_in):
            node.target = transform


_UNROLLED = (torch.ops.aten.rnn_tanh.input, torch.ops.aten.rnn_relu.input)
"""Ops whose own parts write in place, and those of torch's decomposition do not."""


def _make_decompositions(translations: Mapping[Target, Translation]) -> Decompositions:
    """Return the decompositions of the ops that have no translation."""
    targets = [meta.fx_target for meta in get_torchlib_ops()]
    targets += filter(None, map(_registration._get_overload, default_registry))
    return {**_decomp.create_onnx_friendly_decomposition_table({*targets, *translations}), **_STAND_INS}


@functools.cache
def _read_library() -> Mapping[object, list[tuple[Translation, bool]]]:
    """Return op -> its newest translations, each with whether it is for complex numbers."""
    library = defaultdict[object, list[tuple[int, Translation, bool]]](list)
    for meta in get_torchlib_ops():
        library[_key(meta.fx_target)].append((meta.opset_introduced, meta.onnx_function, meta.is_complex))
    for name, overloads in default_registry.items():
        pairs = (*((f, False) for f in overloads.overloads), *((f, True) for f in overloads.complex))
        module, _, function = name.partition("::")  # of Python's, or an op's name
        key = getattr({"_operator": operator, "math": math}.get(module), function, name)
        library[key] += [(TORCHLIB_OPSET, *pair) for pair in pairs]
    newest = {key: max((c[0] for c in found if c[0] <= OPSET), default=0) for key, found in library.items()}
    return {key: [c[1:] for c in found if c[0] == newest[key]] for key, found in library.items()}


def _key(target: object) -> object:
    """Return the library's name of an op; return a Python function unchanged."""
    return target.name() if isinstance(target, OpOverload) else target


@functools.cache
def _detach(translation: Translation) -> Translation:
    """Return a translation that records for the calling context."""
    return cast(Translation, _rebind_value(translation))


class _Core:
    """A stand-in for ``torch.onnx._internal.exporter._core``, from which translations read the current recorder."""

    @property
    def current_tracer(self) -> object:
        """Return the recorder of the calling context."""
        return current_recorder()


_NAMESPACES: dict[str, dict[str, object]] = {}
"""Name of a module of translations -> its globals over recording opsets."""


def _namespace_of(names: dict[str, object]) -> dict[str, object]:
    """Return a copy of a module's globals, in which translations record for the calling context."""
    module = str(names["__name__"])
    if module not in _NAMESPACES:
        copy = _NAMESPACES[module] = dict(names)
        copy.update({name: _rebind_value(value) for name, value in names.items()})
    return _NAMESPACES[module]


def _rebind_value(value: object) -> object:
    """Return the recording form of a global that a translation reads; return a value that records nothing unchanged."""
    match value:
        case Opset():
            return RecordingOpset(value)
        case TracedOnnxFunction():
            return _rebind_value(value.func)
        case OnnxFunction():

            def record_call(*args: object, **kwargs: object) -> Outputs:
                recorder = current_recorder()
                assert isinstance(recorder, Recorder)
                return recorder.record_call(value, *args, **kwargs)

            return record_call
        case types.FunctionType() if value.__module__.startswith(_LIBRARIES):
            return rebind(value, _namespace_of(value.__globals__))
        case types.ModuleType() if value.__name__.startswith(_LIBRARIES):
            return types.SimpleNamespace(**_namespace_of(vars(value)))
        case _:
            return _Core() if value is _core else value
