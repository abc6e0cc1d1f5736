"""Edits of a captured program that change its graph, signature and state together.

``torch.export`` has no public functions for this. A test pins the private fields that are used here
(``_range_constraints``, ``_module_call_graph``, ``_example_inputs``, ``_guards_code``). A second export instead of
edits in place would double the time of a capture.
"""

import copy
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram, ModuleCallSignature
from torch.export.graph_signature import (
    ConstantArgument,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymIntArgument,
    TensorArgument,
)
from torch.fx.node import Target
from torch.utils import _pytree as pytree

from lorac.argument_types import Fields
from lorac.ir.calls.output_structure import OutputStructure
from lorac.ir.graph import ops
from lorac.ir.graph.nodes import SLOTS_KEYWORD, copy_provenance, describe_type
from lorac.ir.graph.symbolic_shapes import make_example, make_size
from lorac.ir.traces.functions import Decompositions, record_function
from lorac.ir.traces.gate import tracing

_VIEWS = {torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default, torch.ops.aten.expand.default}
KnownCalls = dict[object, object]
"""Key of a call (``ops.make_call_key``) -> the example of its value."""


def _call_signature(program: ExportedProgram) -> ModuleCallSignature:
    signature = program._module_call_graph[0].signature
    assert signature is not None
    return signature


def find_fake_mode(program: ExportedProgram) -> FakeTensorMode:
    """Return the fake mode whose tensors describe the program's values."""
    values = (node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder")
    # The first fake mode suffices: this runs for every added node, and a program has an input for each weight.
    mode = next((found for v in values if isinstance(v, torch.Tensor) and (found := detect_fake_mode([v]))), None)
    assert mode is not None
    return mode


def add_dimension(program: ExportedProgram, name: str, hint: int, least: int = 0) -> torch.SymInt:
    """Add a symbolic size that may be any number from ``least`` on."""
    environment = find_fake_mode(program).shape_env
    assert environment is not None
    size = make_size(environment, name, hint, least)
    program._range_constraints[size.node.expr] = environment.var_to_range[size.node.expr]
    return size


def add_inputs(
    program: ExportedProgram, inputs: Mapping[str, tuple[Sequence[int | torch.SymInt], torch.dtype]]
) -> dict[str, fx.Node]:
    """Add tensor inputs by public name, after the program's other inputs.

    Args:
        program: edited in place.
        inputs: public name -> (shape, dtype); sizes may be symbolic.
    """
    graph, mode = program.graph, find_fake_mode(program)
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    nodes: dict[str, fx.Node] = {}
    for name, (shape, dtype) in inputs.items():
        with graph.inserting_after(last):
            # The name that torch's naming pass would give this input; decompositions look the input up by this name.
            last = graph.placeholder(f"{SLOTS_KEYWORD}_" + re.sub(r"\W", "_", name).lower())
        with tracing():
            last.meta["val"] = make_example(mode, shape, dtype)
        last.meta["custom"] = {SLOTS_KEYWORD: name}
        program.graph_signature.input_specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(last.name), None))
        nodes[name] = last
    if not nodes:
        return nodes
    signature, examples = _call_signature(program), dict[str, object]()
    for name, node in nodes.items():
        sizes = [size if isinstance(size, int) else int(size.node.hint) for size in node.meta["val"].shape]
        # Allocate no memory: a slot may be a whole weight.
        examples[name] = torch.zeros((), dtype=node.meta["val"].dtype).expand(sizes)
    edit_keywords(program, lambda given: {**given, SLOTS_KEYWORD: {**given.get(SLOTS_KEYWORD, {}), **examples}})
    signature.inputs.extend(TensorArgument(node.name) for node in nodes.values())
    if signature.forward_arg_names is not None and SLOTS_KEYWORD not in signature.forward_arg_names:
        signature.forward_arg_names = [*signature.forward_arg_names, SLOTS_KEYWORD]
    return nodes


def add_outputs(program: ExportedProgram, nodes: Mapping[str, fx.Node]) -> None:
    """Add outputs after the program's other outputs."""
    output = program.graph.output_node()
    output.args = ((*output.args[0], *nodes.values()),)
    program.graph_signature.output_specs.extend(map(_output_spec, nodes.values()))
    signature = _call_signature(program)
    outputs = pytree.tree_unflatten([object()] * signature.out_spec.num_leaves, signature.out_spec)
    extended = (outputs, {name: object() for name in nodes})
    signature.out_spec = pytree.tree_flatten(extended)[1]


def set_outputs(program: ExportedProgram, nodes: Mapping[str, fx.Node]) -> None:
    """Replace all outputs of a program by named outputs."""
    output = program.graph.output_node()
    output.args = (tuple(nodes.values()),)
    program.graph_signature.output_specs[:] = map(_output_spec, nodes.values())
    signature = _call_signature(program)
    signature.outputs.clear()
    signature.out_spec = pytree.tree_flatten({name: object() for name in nodes})[1]


def _output_spec(node: fx.Node) -> OutputSpec:
    return OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None)


def drop_inputs(program: ExportedProgram, names: Collection[str]) -> None:
    """Remove unused inputs from a program whose inputs are called by name."""
    signature = _call_signature(program)
    for node in [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]:
        program.graph.erase_node(node)
    specs = program.graph_signature.input_specs
    specs[:] = [spec for spec in specs if getattr(spec.arg, "name", "") not in names]
    signature.inputs[:] = [each for each in signature.inputs if each.name not in names]
    edit_keywords(program, lambda given: {name: value for name, value in given.items() if name not in names})
    if signature.forward_arg_names is not None:
        signature.forward_arg_names = [name for name in signature.forward_arg_names if name not in names]


def move_inputs_last(program: ExportedProgram, names: Sequence[str]) -> None:
    """Move these inputs after all others, in this order; the caller reorders the keywords."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    last = [*nodes.values()][-1]
    for name in names:
        if nodes[name] is not last:
            last.append(nodes[name])
        last = nodes[name]
    place = {name: index for index, name in enumerate(names, 1)}
    program.graph_signature.input_specs.sort(key=lambda spec: place.get(getattr(spec.arg, "name", ""), 0))
    _call_signature(program).inputs.sort(key=lambda each: place.get(each.name, 0))


def edit_keywords(program: ExportedProgram, edit: Callable[[Fields], Fields]) -> None:
    """Edit the keyword arguments of a program's call, in the signature and in the example inputs."""
    signature = _call_signature(program)
    args, kwargs = pytree.tree_unflatten([object()] * signature.in_spec.num_leaves, signature.in_spec)
    signature.in_spec = pytree.tree_flatten((args, edit(kwargs)))[1]
    if program._example_inputs is not None:
        args, kwargs = program._example_inputs
        program._example_inputs = (args, dict(edit(kwargs)))


def copy_program(program: ExportedProgram) -> ExportedProgram:
    """Return a copy that can be edited alone; it shares the tensors and has the same node names."""
    made = copy.copy(program)
    made._graph_module = fx.GraphModule(program.graph_module, copy_graph(program.graph))
    specs = program.graph_signature
    made._graph_signature = replace(specs, input_specs=[*specs.input_specs], output_specs=[*specs.output_specs])
    entry, *rest = program._module_call_graph
    assert entry.signature is not None
    signature = replace(entry.signature, inputs=[*entry.signature.inputs], outputs=[*entry.signature.outputs])
    made._module_call_graph = [replace(entry, signature=signature), *rest]
    made._state_dict, made._constants = dict(program.state_dict), dict(program.constants)
    made._range_constraints = dict(program._range_constraints)
    made._guards_code = []  # guards exclude sizes of 0 and 1, though torch uses them only to decide strides
    return made


def drop_unused_sizes(program: ExportedProgram) -> None:
    """Drop the ranges of sizes that no input has; keep the ranges of sizes that depend on values."""
    values = (node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder")
    sizes: list[Any] = [size for value in values if isinstance(value, torch.Tensor) for size in value.shape]
    used = {symbol for size in sizes if not isinstance(size, int) for symbol in size.node.expr.free_symbols}
    ranges = program._range_constraints.items()
    program._range_constraints = {symbol: own for symbol, own in ranges if symbol in used or str(symbol)[0] == "u"}


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """Return a copy of a graph with the same node names; the code that calls the graph is not copied."""
    copied, output = fx.Graph(), graph.output_node()
    copied.output(copied.graph_copy(graph, {})).meta = {**output.meta}
    for node, original in zip(copied.nodes, graph.nodes, strict=True):
        node.name = original.name  # fx renames an input with the name of a builtin, such as "input", in a copy
    return copied


def keep_tensor_outputs(program: ExportedProgram) -> OutputStructure:
    """Restrict a program's outputs to tensors; return the structure that rebuilds the model's output from them."""
    signature = _call_signature(program)
    output = program.graph.output_node()
    specs = program.graph_signature.output_specs
    pairs = list(zip(specs, output.args[0], strict=True))
    outputs = [(spec, value) for spec, value in pairs if spec.kind is OutputKind.USER_OUTPUT]
    constants = {i: spec.arg.value for i, (spec, _) in enumerate(outputs) if isinstance(spec.arg, ConstantArgument)}
    numbers = tuple(i for i, (spec, _) in enumerate(outputs) if isinstance(spec.arg, SymIntArgument))
    structure = OutputStructure(signature.out_spec, constants, numbers)
    if not constants and not numbers:
        return structure
    tensors = [_as_tensor(program, value, output) for i, (_, value) in enumerate(outputs) if i not in constants]
    others = [(spec, value) for spec, value in pairs if spec.kind is not OutputKind.USER_OUTPUT]
    output.args = ((*(value for _, value in others), *tensors),)
    specs[:] = [*(spec for spec, _ in others), *map(_output_spec, tensors)]
    # torch lists no outputs of a whole program here, and does not find listed outputs after a decomposition.
    signature.outputs.clear()
    signature.out_spec = pytree.tree_flatten(tuple(tensors))[1]
    update_signature(program)
    return structure


def _as_tensor(program: ExportedProgram, value: fx.Node, before: fx.Node) -> fx.Node:
    """Convert a size to a tensor; return a tensor unchanged."""
    if isinstance(value.meta["val"], torch.Tensor):
        return value
    with program.graph.inserting_before(before):
        made = program.graph.call_function(torch.ops.aten.scalar_tensor.default, (value,), {"dtype": torch.int64})
    with tracing(), find_fake_mode(program):
        made.meta["val"] = torch.empty((), dtype=torch.int64)
    return made


def drop_unused_state(program: ExportedProgram) -> list[str]:
    """Remove unused parameters, buffers and constants; return their names."""
    signature, dropped = program.graph_signature, []
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    for spec in list(signature.input_specs):
        node = nodes.get(getattr(spec.arg, "name", ""))
        if spec.kind is InputKind.USER_INPUT or node is None or node.users:
            continue
        program.graph.erase_node(node)
        signature.input_specs.remove(spec)
        dropped.append(str(spec.target))
    remaining = {spec.target for spec in signature.input_specs}
    for name in dropped:
        if name not in remaining:
            program.state_dict.pop(name, None)
            program.constants.pop(name, None)
    return dropped


def qualify_names(program: ExportedProgram, prefix: str) -> ExportedProgram:
    """Prefix the names of modules and tensors in a component's program, in place; return the program.

    Args:
        program: as captured from the component alone.
        prefix: the component's name and a dot; empty for a model without components.
    """
    if not prefix:
        return program
    for tensors in (program.state_dict, program.constants):
        for name in list(tensors):
            tensors[f"{prefix}{name}"] = tensors.pop(name)
    for spec in (*program.graph_signature.input_specs, *program.graph_signature.output_specs):
        if spec.target is not None:
            spec.target = f"{prefix}{spec.target}"
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            node.meta["nn_module_stack"] = {
                key: (f"{prefix}{path}".removesuffix("."), *rest) for key, (path, *rest) in stack.items()
            }
    return program


def inline(
    program: ExportedProgram,
    node: fx.Node,
    function: Callable[..., object],
    operands: Sequence[fx.Node],
    traced: fx.GraphModule | None = None,
    *,
    origin: fx.Node | None = None,
    in_places: bool = False,
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """Insert ``function(*operands)``, traced to aten, before ``node``; return the trace and the nodes of its outputs.

    The new nodes get the provenance of ``origin``, by default of ``node``. A trace may be reused for operands whose
    shapes differ only in the names of symbolic sizes. Pass ``in_places`` for a function that calls ``torch.vmap``.
    """
    if traced is None:
        traced = (trace_in_places if in_places else trace_function)(program, function, operands)
    places = [n for n in traced.graph.nodes if n.op == "placeholder"]
    environment: dict[fx.Node, fx.Node] = dict(zip(places, operands, strict=True))
    sizes, mode = _renamed(places, operands), find_fake_mode(program)

    def resize(value: object) -> object:
        if not isinstance(value, torch.Tensor) or not any(str(size) in sizes for size in value.shape):
            return value
        return make_example(mode, [sizes.get(str(size), size) for size in value.shape], value.dtype)

    for inner in traced.graph.nodes:
        if inner.op == "get_attr":
            environment[inner] = add_constant(program, getattr(traced, str(inner.target)))
    computed = [inner for inner in traced.graph.nodes if inner.op not in {"placeholder", "get_attr", "output"}]
    with program.graph.inserting_before(node):
        for inner in computed:
            copied = program.graph.node_copy(inner, lambda n: environment[n])
            example = inner.meta.get("val")
            copied.meta = {"val": pytree.tree_map(resize, example) if sizes else example}
            copy_provenance(copied, node if origin is None else origin)
            environment[inner] = copied
    results: Any = traced.graph.output_node().args[0]
    return traced, list(fx.map_arg(results, lambda n: environment[n]))


def _renamed(places: Sequence[fx.Node], operands: Sequence[fx.Node]) -> dict[str, int | torch.SymInt]:
    """Map sizes of a trace, such as ranks, to the sizes of the operands for which it is reused, if they differ."""
    pairs = [(place.meta["val"], operand.meta["val"]) for place, operand in zip(places, operands, strict=True)]
    shapes = [(a.shape, b.shape) for a, b in pairs if isinstance(a, torch.Tensor)]
    return {str(old): new for a, b in shapes for old, new in zip(a, b, strict=True) if str(old) != str(new)}


def insert_call(program: ExportedProgram, before: fx.Node, op: Target, *operands: Any, **named: Any) -> fx.Node:
    """Insert a call of an op before a node, with that node's provenance."""
    return insert_repeated_call(program, {}, before, op, *operands, **named)


def insert_repeated_call(
    program: ExportedProgram,
    known: KnownCalls,
    before: fx.Node,
    op: Target,
    *operands: Any,
    **named: Any,
) -> fx.Node:
    """Insert a call as ``insert_call`` does; ``known`` caches examples of values for repeated layers."""
    assert callable(op)
    given = fx.map_arg(operands, lambda operand: operand.meta["val"])
    key = ops.make_call_key(op, given, named)
    if key not in known:
        with tracing(), find_fake_mode(program), torch.no_grad():
            known[key] = op(*given, **named)
    with program.graph.inserting_before(before):
        node = program.graph.call_function(op, operands, named)
    node.meta["val"] = known[key]
    copy_provenance(node, before)
    return node


def add_constant(program: ExportedProgram, value: torch.Tensor) -> fx.Node:
    """Add a constant tensor to the program; return its placeholder, which precedes the caller's inputs."""
    specs = program.graph_signature.input_specs
    first = next(index for index, spec in enumerate(specs) if spec.kind is InputKind.USER_INPUT)
    name = f"{SLOTS_KEYWORD}_constant_{len(program.constants)}"
    with program.graph.inserting_before([n for n in program.graph.nodes if n.op == "placeholder"][first]):
        node = program.graph.placeholder(name)
    node.meta["val"] = find_fake_mode(program).from_tensor(value, static_shapes=True)
    specs.insert(first, InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(node.name), name))
    program.constants[name] = value
    return node


def trace_function(
    program: ExportedProgram,
    function: Callable[..., object],
    operands: Sequence[fx.Node],
    decompositions: Decompositions | None = None,
) -> fx.GraphModule:
    """Trace ``function``, which returns a tuple, over examples of ``operands``, to aten or by ``decompositions``."""
    values: list[torch.Tensor] = []
    for value in (operand.meta["val"] for operand in operands):
        # A trace would treat two operands with the same example as one operand.
        known = any(value is other for other in values)
        values.append(value.new_empty_strided(value.shape, value.stride()) if known else value)
    with tracing(), find_fake_mode(program), torch.no_grad():
        module = record_function(function, *values, decompositions=decompositions, pre_dispatch=decompositions is None)
    module.graph.eliminate_dead_code()
    return module


def trace_in_places(
    program: ExportedProgram, function: Callable[..., object], operands: Sequence[fx.Node]
) -> fx.GraphModule:
    """Trace, as ``trace_function`` does, a function that calls ``torch.vmap`` over places.

    Ops below autograd are recorded, because ``torch.vmap`` acts there. Views that change no shape, which it leaves
    behind, are dropped.
    """
    traced = trace_function(program, function, operands, {})
    for node in traced.graph.nodes:
        if node.target in _VIEWS and have_equal_types(node.args[0], node):
            node.replace_all_uses_with(node.args[0])
    traced.graph.eliminate_dead_code()
    return traced


def have_equal_types(node: fx.Node, other: fx.Node) -> bool:
    """Return whether two nodes have tensors of one dtype and shape."""
    return describe_type(node.meta["val"]) == describe_type(other.meta["val"])


def update_signature(program: ExportedProgram) -> None:
    """Update the output names in the signature and validate the program; do not update the module's code."""
    output, named = program.graph.output_node(), _call_signature(program).outputs
    for index, (spec, node) in enumerate(zip(program.graph_signature.output_specs, output.args[0], strict=True)):
        if not isinstance(node, fx.Node) or not isinstance(spec.arg, TensorArgument):
            continue
        spec.arg = TensorArgument(node.name)
        if index < len(named):
            named[index] = spec.arg
    program.graph.lint()
    program.validate()
