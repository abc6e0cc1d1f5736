"""Conversion of a torch.export program to an ONNX model, by one walk over its graph.

The model gets the same nodes, names and metadata as from ``torch.onnx.export``.
"""

import itertools
import operator
from collections.abc import Mapping, Sequence

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype
from onnxscript import OnnxFunction, version_converter
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.fx.node import Argument

from lorac.backends.onnx.export.opsets import Outputs, record_with
from lorac.backends.onnx.export.torchlib import (
    OPSET,
    TENSOR_OPSET,
    TORCHLIB_OPSET,
    Recorder,
    SymbolicTensor,
    Target,
    Translation,
    find_translation,
)

_IR_VERSION = 10
_FUNCTION_DOMAIN = "pkg.torch.__subgraph__"
_SIGNATURE = "pkg.torch.export.ExportedProgram.graph_signature"
_SPEC = "pkg.torch.export.graph_signature"
_ASSERTIONS = frozenset(
    {
        torch.ops.aten.sym_constrain_range_for_size.default,
        torch.ops.aten._assert_async.default,
        torch.ops.aten._assert_async.msg,
        torch.ops.aten._assert_scalar.default,
        torch.ops.aten._assert_tensor_metadata.default,
    }
)
"""Ops that only raise; no node reads them."""


class TranslationFailed(Exception):
    """An error: a node has no translation, or its translation fails.

    Args:
        reason: the reason; default: the message of the cause.
    """

    def __init__(self, node: fx.Node, reason: str = "") -> None:
        super().__init__(reason)
        self.node = node


def translate(
    program: ExportedProgram, graphs: Mapping[str, fx.Graph], translations: Mapping[Target, Translation]
) -> ir.Model:
    """Convert a program to a model.

    Args:
        program: the program, which has the signature and the weights.
        graphs: module path -> graph, "" for the program's own graph; every op has a translation, and casts are
            explicit.
        translations: op -> translation, which takes precedence over torch's.

    Raises:
        TranslationFailed: a node could not be translated.
    """
    metadata = {
        _SIGNATURE: str(program.graph_signature),
        "pkg.torch.export.ExportedProgram.range_constraints": str(program.range_constraints),
    }
    main = ir.Graph((), (), nodes=(), name="main_graph", metadata_props=metadata)
    model = ir.Model(main, ir_version=_IR_VERSION, producer_name="pytorch", producer_version=torch.__version__)
    functions: dict[str, ir.Function] = {}
    # Branches and loops have graphs of their own, which must become functions before the calling graph is translated.
    for path, graph in reversed([(path, graph) for path, graph in graphs.items() if path]):
        body = ir.Graph((), (), nodes=())
        function = ir.Function(_FUNCTION_DOMAIN, path.replace(".", "__"), graph=body, attributes=())
        functions[path] = model.functions[function.identifier()] = function
        _GraphTranslator(function, model, _functions_below(functions, f"{path}."), translations).run(graph)
    values = _GraphTranslator(main, model, _functions_below(functions, ""), translations).run(graphs[""])
    _set_interface(program, main, values)
    for part in (main, *(function.graph for function in model.functions.values())):
        nodes = ir.traversal.RecursiveGraphIterator(part)
        versions = {node.domain: node.version or 1 for node in nodes if node.domain}
        part.opset_imports.update({**versions, "": TORCHLIB_OPSET})
    for function in model.functions.values():
        model.opset_imports.update({d: v for d, v in function.opset_imports.items() if d not in model.opset_imports})
    version_converter.convert_version(model, OPSET, fallback=True)
    return model


def _functions_below(functions: Mapping[str, ir.Function], prefix: str) -> dict[str, ir.Function]:
    """Return attribute -> function, for the subgraphs of one module."""
    names = {path.removeprefix(prefix): function for path, function in functions.items() if path.startswith(prefix)}
    return {name: function for name, function in names.items() if "." not in name}


class _GraphTranslator:
    """A translator of one graph.

    Args:
        target: the graph or function that receives inputs, nodes and outputs.
        model: the model that receives the functions that translations call.
        functions: attribute -> function, for the graph's branches and loops.
        translations: op -> translation, which takes precedence over torch's.
    """

    def __init__(
        self,
        target: ir.Graph | ir.Function,
        model: ir.Model,
        functions: Mapping[str, ir.Function],
        translations: Mapping[Target, Translation],
    ) -> None:
        self.target, self.model, self.functions, self.translations = target, model, functions, translations
        self.values: dict[str, Outputs] = {}
        self.recorder = Recorder()  # type: ignore[abstract]  # torch's is an evaluator of onnxscript's older kind

    def run(self, graph: fx.Graph) -> dict[str, Outputs]:
        """Translate all nodes; return name -> value."""
        with record_with(self.recorder):
            for node in graph.nodes:
                self._translate(node)
        for (domain, name, overload), function in self.recorder.functions.items():
            if (domain, name, overload) not in self.model.functions:
                assert isinstance(function, OnnxFunction)
                compiled = ir.serde.deserialize_function(function.to_function_proto())
                self.model.functions[domain, name, overload] = compiled
        return self.values

    def _translate(self, node: fx.Node) -> None:
        try:
            if node.op == "placeholder":
                value = SymbolicTensor(TENSOR_OPSET, name=node.name)  # type: ignore[arg-type]  # stands for an Opset
                value.meta["node"] = node
                _annotate(value, node.meta["val"])
                self.values[node.name] = value
                self.target.inputs.append(value)
            elif node.op == "output":
                outputs: list[fx.Node] = []
                fx.map_arg(node.args, outputs.append)
                self.target.outputs.extend(v for output in outputs for v in _as_sequence(self.values[output.name]))
            elif node.op == "call_function" and node.target not in _ASSERTIONS:
                self._translate_call(node)
        except TranslationFailed:
            raise
        except Exception as error:  # a translation may raise any exception
            raise TranslationFailed(node) from error

    def _translate_call(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            source = self.values[node.all_input_nodes[0].name]
            if isinstance(source, Sequence):  # otherwise it is an ONNX sequence, which has its own op
                index = node.args[1]
                assert isinstance(index, int)
                self.values[node.name] = value = source[index]
                value.name = node.name
                return
        translation = find_translation(node, self.translations)
        if translation is None:
            raise TranslationFailed(node, f"No ONNX function found for {node.target}")
        kwargs = {name: self._operand(value) for name, value in node.kwargs.items()}
        if kwargs.get("dtype", 0) is None:
            kwargs["dtype"] = -1
        outputs = translation(*map(self._operand, node.args), **kwargs)
        nodes = self.recorder.take_nodes()
        self._keep_outputs(node, outputs)
        modules = list((node.meta.get("nn_module_stack") or {}).values())
        scopes = [
            (path, kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__name__}".removeprefix("builtins."))
            for path, kind in modules
        ]
        scopes.append((node.name, str(node.target)))
        metadata = {
            "namespace": "/".join([f"{path}: {kind}" for path, kind in scopes]),
            "pkg.torch.onnx.class_hierarchy": repr([kind for _, kind in scopes]),
            "pkg.torch.onnx.name_scopes": repr([path for path, _ in scopes]),
            "pkg.torch.onnx.fx_node": str(node.format_node()),
            "pkg.torch.onnx.stack_trace": node.meta.get("stack_trace", ""),
        }
        for made in nodes:
            made.meta["node"] = node
            made.metadata_props.update(metadata)
        self.target.extend(nodes)

    def _keep_outputs(self, node: fx.Node, outputs: Outputs) -> None:
        self.values[node.name] = outputs
        if isinstance(outputs, Sequence):
            names, examples = [f"{node.name}__{i}" for i in range(len(outputs))], node.meta["val"]
        else:
            names, examples = [node.name], (node.meta["val"],)
        known = itertools.chain(examples, itertools.repeat(None))  # a translation may return more than the op does
        for name, value, example in zip(names, _as_sequence(outputs), known, strict=False):
            _annotate(value, example)
            value.name = name
            producer = value.producer()
            if producer is not None:
                producer.name = f"node_{name}"

    def _operand(self, operand: Argument) -> object:
        """Convert an operand to the form that translations accept: a value, a function, a number, or lists of these."""
        if isinstance(operand, fx.Node):
            return self.functions[str(operand.target)] if operand.op == "get_attr" else self.values[operand.name]
        if isinstance(operand, list | tuple):
            return [self._operand(element) for element in operand]
        if isinstance(operand, torch.device | torch.memory_format | torch.layout):
            return str(operand)
        return from_torch_dtype(operand) if isinstance(operand, torch.dtype) else operand


def _as_sequence(value: Outputs) -> Sequence[ir.Value]:
    return value if isinstance(value, Sequence) else (value,)


def _annotate(value: ir.Value, example: object) -> None:
    """Set a value's dtype and shape to those of an example."""
    if isinstance(example, torch.Tensor):
        sizes: list[int | str] = [size if isinstance(size, int) else str(size.node) for size in example.shape]
        if value.dtype is None:  # a translation may have set the exact one
            is_complex = example.dtype.is_complex
            value.dtype = from_torch_dtype(example.dtype.to_real() if is_complex else example.dtype)
            sizes += [2] if is_complex else []  # the real and the imaginary part
        value.shape = ir.Shape(sizes)
        return
    for types, dtype in _NUMBERS:
        if isinstance(example, types):
            value.dtype, value.shape = dtype, ir.Shape([])
            return


_NUMBERS = (
    ((int, torch.SymInt), ir.DataType.INT64),
    (torch.SymBool, ir.DataType.BOOL),
    ((float, torch.SymFloat), ir.DataType.FLOAT),
)


def _set_interface(program: ExportedProgram, graph: ir.Graph, values: Mapping[str, Outputs]) -> None:
    """Set the graph's inputs and outputs to the program's; make weights initializers, under their names."""
    graph.inputs.clear()
    graph.outputs.clear()
    for spec in program.graph_signature.input_specs:
        if isinstance(spec.arg, ConstantArgument):
            continue
        value = values[spec.arg.name]
        assert isinstance(value, ir.Value)
        value.metadata_props[f"{_SPEC}.InputSpec.kind"] = spec.kind.name
        value.metadata_props[f"{_SPEC}.InputSpec.persistent"] = str(spec.persistent)
        if spec.kind is InputKind.USER_INPUT:
            graph.inputs.append(value)
        elif spec.target is not None:
            value.name, value.metadata_props["pkg.torch.onnx.original_node_name"] = spec.target, spec.arg.name
            graph.initializers[spec.target] = value
    for spec in program.graph_signature.output_specs:
        outputs = () if isinstance(spec.arg, ConstantArgument) else _as_sequence(values[spec.arg.name])
        for output in outputs:
            output.metadata_props[f"{_SPEC}.OutputSpec.kind"] = spec.kind.name
        graph.outputs.extend(outputs if spec.kind is OutputKind.USER_OUTPUT else ())
    for name, tensor in (*program.named_parameters(), *program.named_buffers(), *program.constants.items()):
        initializer = graph.initializers.get(name)
        if initializer is not None:
            whole = torch.view_as_real(tensor) if tensor.dtype.is_complex else tensor
            initializer.const_value = TorchTensor(whole, name=name)
            _annotate(initializer, whole)
