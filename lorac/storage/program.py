"""A lowered program as JSON and tensors, for artifacts of targets without ONNX.

``torch.export.save`` is not used, since loading unpickles its file, and evaluates text to parse sizes. Here a program
is a list of nodes: an op by its registered name, operands, and the names of tensors. Loading looks ops up among the
functional ones (``lorac.storage.op_names``), and runs nothing.
"""

import inspect
import keyword
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from lorac.errors import ArtifactError, Unavailable, short
from lorac.limits import claim_memory, is_trusted
from lorac.storage.bounded_run import BoundedRun
from lorac.storage.op_guards import GuardedOp
from lorac.storage.op_names import find_op, op_name
from lorac.storage.strict_json import Json, JsonObject

MOST_NODES = 100_000
"""The most nodes of a program: ten times as many as the largest tested model has."""
_ROOM, _SLACK = 16, 1 << 26
"""The limit of a size that a program names: ``_ROOM`` times the number of values of its tensors, plus ``_SLACK``."""
_NAMED: dict[str, type] = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
_NODE = "node"
_NO_END = 1 << 62
"""From this number on, the end of a slice means that the slice has no end."""


def program_to_json(program: ExportedProgram) -> JsonObject:
    """Return a program's nodes as JSON. Inputs that are not the caller's have the name of their tensor.

    Raises:
        Unavailable: the program has a nested graph, or a value without a JSON form.
    """
    from lorac.ir.graph.symbolic_shapes import constant_size

    signature = {getattr(spec.arg, "name", ""): spec for spec in program.graph_signature.input_specs}

    def describe_input(node: fx.Node) -> JsonObject:
        spec = signature[node.name]
        if spec.kind is not InputKind.USER_INPUT:
            return {"tensor": spec.target}
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            raise _unstorable(f"a program whose input '{node.name}' is a {type(value).__name__}")
        return {
            "shape": [size if isinstance(size, int) else int(size.node.hint) for size in value.shape],
            "dtype": str(value.dtype).removeprefix("torch."),
            "dynamic": [axis for axis, size in enumerate(value.shape) if constant_size(size) is None],
        }

    return {"nodes": nodes_to_json(program.graph, describe_input)}


def nodes_to_json(graph: fx.Graph, describe_input: Callable[[fx.Node], JsonObject] = lambda _: {}) -> list[JsonObject]:
    """Return a graph's nodes as JSON.

    Args:
        describe_input: returns the stored fields of an input besides its name.

    Raises:
        Unavailable: the graph has a nested graph, or a value without a JSON form.
    """
    nodes: list[JsonObject] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            nodes.append({"input": node.name, **describe_input(node)})
        elif node.op == "call_function":
            kwargs = {key: _operand_to_json(value) for key, value in node.kwargs.items()}
            name = op_name(node.target)
            if name is None:
                raise _unstorable(f"a captured program that calls {node.target}")
            nodes.append({"name": node.name, "op": name, "args": _operand_to_json(node.args), "kwargs": kwargs})
        elif node.op == "output":
            nodes.append({"output": _operand_to_json(node.args[0])})
        else:
            raise _unstorable(f"a captured program with a nested graph ('{node.target}')")
    return nodes


def _unstorable(subject: str) -> Unavailable:
    return Unavailable(f"{subject} cannot be stored", next_step="compile for target='onnxruntime' and save that")


def make_functional(program: ExportedProgram) -> ExportedProgram:
    """Return a program in which no op writes into its operands."""
    ops = (node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload))
    return program.run_decompositions({}) if any(op._schema.is_mutable for op in ops) else program


def collect_tensors(program: ExportedProgram) -> dict[str, Tensor]:
    """Return the tensors that a program reads besides the caller's, by name."""
    tensors = {**program.state_dict, **{k: v for k, v in program.constants.items() if isinstance(v, Tensor)}}
    names = [str(s.target) for s in program.graph_signature.input_specs if s.kind is not InputKind.USER_INPUT]
    return {name: tensors[name].detach() for name in names}


class StoredProgram(nn.Module):
    """A program that was read from an artifact. A call takes inputs by name, and returns the outputs in order.

    Args:
        stored: the program as ``program_to_json`` wrote it.

    Attributes:
        inputs: pairs of an input and the name of its tensor, or None for the caller's, in order.
        examples: values for the caller's inputs, with the captured shapes and dtypes.
        dynamic: dynamic axes of the caller's inputs.
    """

    def __init__(self, stored: JsonObject, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        graph, self.inputs = nodes_from_json(stored["nodes"])
        callers = {entry["input"]: entry for entry in stored["nodes"] if "shape" in entry}
        self.examples: dict[str, Tensor] = {}
        for name, entry in callers.items():  # ones for integers, which are valid ids and masks, and noise for the rest
            dtype, shape = _operand_from_json({"dtype": entry["dtype"]}, {}), entry["shape"]
            claim_memory(math.prod(shape) * dtype.itemsize, "the example of an input")
            if dtype.is_floating_point:
                self.examples[name] = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            else:
                self.examples[name] = torch.ones(shape, dtype=dtype)
        self.dynamic = {name: tuple(entry["dynamic"]) for name, entry in callers.items()}
        self.program = fx.GraphModule(nn.Module(), graph)
        for name in dict.fromkeys(tensor for _, tensor in self.inputs if tensor is not None):
            if name not in tensors:
                raise ArtifactError(f"the program reads the tensor '{name}', which the artifact lacks")
            self.register_buffer(_buffer_name(name), tensors[name])
        held = sum(tensor.numel() for tensor in (*self.buffers(), *self.examples.values()))
        check_sizes(graph, _ROOM * held + _SLACK)

        def forward(**given: Tensor) -> tuple[Tensor, ...]:
            return tuple(self.program(*self._collect(given)))

        kind = inspect.Parameter.KEYWORD_ONLY
        forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # functions take attributes
            [inspect.Parameter(name, kind) for name, tensor in self.inputs if tensor is None]
        )
        self.forward = forward
        self.bounded = BoundedRun(self.program, [tensor is None for _, tensor in self.inputs], is_trusted())

    def call_bounded(self, given: Mapping[str, Tensor]) -> Sequence[Any]:
        """Return the outputs for some inputs; raises ``InputMismatch`` where a limit (``BoundedRun``) is exceeded."""
        return self.bounded(self._collect(given))

    def _collect(self, given: Mapping[str, Tensor]) -> list[Tensor]:
        return [given[name] if tensor is None else getattr(self, _buffer_name(tensor)) for name, tensor in self.inputs]


def nodes_from_json(nodes: Sequence[JsonObject]) -> tuple[fx.Graph, list[tuple[str, str | None]]]:
    """Return a graph of stored nodes, and pairs of an input and the name of its tensor, or None for the caller's.

    torch.fx writes names of inputs and keywords into code that it runs, so they must be names of Python.

    Raises:
        ArtifactError: a node calls something other than an op that artifacts may name; there are too many nodes, or a
            name is not an identifier.
    """
    if len(nodes) > MOST_NODES:
        raise ArtifactError(f"the program has {len(nodes)} nodes, more than {MOST_NODES}")
    graph, known, inputs = fx.Graph(), {}, []
    for entry in nodes:
        if "input" in entry:
            name = _check_identifier(entry["input"])
            inputs.append((name, entry.get("tensor")))
            known[name] = graph.placeholder(name)
        elif "output" in entry:
            graph.output(tuple(_operand_from_json(entry["output"], known)))
        else:
            args = tuple(_operand_from_json(entry["args"], known))
            kwargs = {_check_identifier(k): _operand_from_json(value, known) for k, value in entry["kwargs"].items()}
            name = _check_identifier(entry["name"])
            known[name] = graph.create_node("call_function", find_op(entry["op"]), args, kwargs, name=name)
    return graph, inputs


def _check_identifier(name: object) -> str:
    if not isinstance(name, str) or not name.isidentifier() or not name.isascii() or keyword.iskeyword(name):
        raise ArtifactError(f"the program has the name {short(name)}, which is not an identifier of Python")
    return name


def check_sizes(graph: fx.Graph, most: int) -> None:
    """Refuse a graph that names far too large sizes, before it allocates anything.

    Raises:
        ArtifactError: the numbers of an operand multiply to more than ``most``.
    """
    for node in graph.nodes:
        op = node.target.op if isinstance(node.target, GuardedOp) else node.target
        arguments = op._schema.arguments if isinstance(op, torch._ops.OpOverload) else ()
        kinds = {argument.name: str(argument.type) for argument in arguments}
        operands = [*zip(kinds, node.args, strict=False), *node.kwargs.items()]
        numbers = [value for name, value in operands if type(value) is int and "int" in kinds.get(name, "").lower()]
        sizes = [value for _, value in operands if isinstance(value, list | tuple)]
        sizes += [[number] for number in numbers if abs(number) < _NO_END]
        if not node.all_input_nodes:  # a call without tensors allocates by its numbers
            sizes.append([value for _, value in operands if type(value) is int])
        if any(_product(one) > most for one in sizes):
            raise ArtifactError(f"a stored program asks {node.target} for sizes that are far too large")


def _product(sizes: Iterable[object]) -> int:
    return math.prod(max(abs(size), 1) for size in sizes if type(size) is int)


def _operand_to_json(value: object) -> Json:
    """Return an operand as JSON."""
    if isinstance(value, fx.Node):
        return {_NODE: value.name}
    if isinstance(value, tuple | list):
        return [_operand_to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, cls in _NAMED.items():
        if isinstance(value, cls):
            return {kind: str(value).removeprefix("torch.")}
    raise _unstorable(f"a captured program with an operand of type {type(value).__name__}")


def _operand_from_json(stored: Json, known: Mapping[str, fx.Node]) -> Any:
    if isinstance(stored, list):
        return [_operand_from_json(item, known) for item in stored]
    if not isinstance(stored, dict):
        return stored
    ((kind, text),) = stored.items()
    if kind == _NODE:
        return known[text]
    if kind == "float":
        return float(text)
    if kind == "device":
        return torch.device(text)
    found = getattr(torch, text, None) if kind in _NAMED else None
    if not isinstance(found, _NAMED.get(kind, ())):
        raise ArtifactError(f"the program has the operand {stored!r}, which lorac does not store")
    return found


def _buffer_name(name: str) -> str:
    return "held_" + name.replace(".", "/")
