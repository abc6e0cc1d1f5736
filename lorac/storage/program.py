"""A lowered program as JSON and tensors, and back: what an artefact stores where there is no ONNX.

``torch.export.save`` unpickles what it loads and parses sizes by evaluating text, so neither is used. Here a program is
a list of nodes: an op by its registered name, operands, and the tensors beside it by name. Loading looks ops up among
those that torch has registered under a few namespaces and runs nothing.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from lorac.errors import ArtifactError, Unavailable
from lorac.ir.graph import ops

Tensor = torch.Tensor
_NAMESPACES = frozenset({"aten", "prims", next(iter(ops.SITE_OPS)).namespace})
_FUNCTIONS: dict[str, Any] = {"operator": operator, "math": math, "torch": torch}
_FUNCTION_NAMES = frozenset(
    {"getitem", "add", "sub", "mul", "truediv", "floordiv", "mod", "neg", "pow", "eq", "ne", "lt", "le", "gt", "ge"}
    | {"and_", "or_", "not_", "ceil", "floor", "trunc", "sym_float", "sym_int", "sym_max", "sym_min", "sym_not"}
    | {"sym_ite", "sym_sum"}
)
_FORBIDDEN = frozenset({"filename"})
"""Arguments of the few registered ops that touch files."""
_NAMED: dict[str, type] = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
_NODE = "node"


def program_to_json(program: ExportedProgram) -> dict[str, Any]:
    """A program's nodes. Inputs are in order, each with the name of its tensor where it is not the caller's.

    Raises:
        Unavailable: it holds a nested graph or a value that has no plain form.
    """
    signature = {getattr(spec.arg, "name", ""): spec for spec in program.graph_signature.input_specs}
    nodes: list[dict[str, Any]] = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = signature[node.name]
            given = spec.kind is InputKind.USER_INPUT
            nodes.append({"input": node.name, **(_example(node) if given else {"tensor": spec.target})})
        elif node.op == "call_function":
            nodes.append(call_to_json(node))
        elif node.op == "output":
            nodes.append({"output": operand_to_json(node.args[0])})
        else:
            raise _unstorable(f"a captured program with a nested graph ('{node.target}')")
    return {"nodes": nodes}


def _unstorable(what: str) -> Unavailable:
    return Unavailable(f"{what} cannot be stored", next_step="compile for target='onnxruntime' and save that")


def call_to_json(node: fx.Node) -> dict[str, Any]:
    """A node that calls an op."""
    kwargs = {key: operand_to_json(value) for key, value in node.kwargs.items()}
    return {"name": node.name, "op": _name_of(node.target), "args": operand_to_json(node.args), "kwargs": kwargs}


def collect_tensors(program: ExportedProgram) -> dict[str, Tensor]:
    """Every tensor a program reads that is not the caller's, by name."""
    held = {**program.state_dict, **{k: v for k, v in program.constants.items() if isinstance(v, Tensor)}}
    names = [str(s.target) for s in program.graph_signature.input_specs if s.kind is not InputKind.USER_INPUT]
    return {name: held[name].detach() for name in names}


class StoredProgram(nn.Module):
    """A program that was read back.

    Args:
        stored: as ``to_json`` gives it.
        tensors: its tensors by name.

    Calling it takes the caller's inputs by name and answers the program's outputs, flat.

    Attributes:
        inputs: (name, name of its tensor, or None where the caller gives it), in order.
        examples: caller's inputs by name, as the program was captured with in shape and dtype.
        dynamic: their dynamic axes.
    """

    def __init__(self, stored: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        graph, self.inputs = graph_from_json(stored["nodes"])
        given = {entry["input"]: entry for entry in stored["nodes"] if "shape" in entry}
        self.examples = {name: _made(entry) for name, entry in given.items()}
        self.dynamic = {name: tuple(entry["dynamic"]) for name, entry in given.items()}
        self.program = fx.GraphModule(nn.Module(), graph)
        for name in dict.fromkeys(held for _, held in self.inputs if held is not None):
            if name not in tensors:
                raise ArtifactError(f"the program reads the tensor '{name}', which the artefact lacks")
            self.register_buffer(_key(name), tensors[name])

        self.forward = self._with_signature()

    def _with_signature(self) -> Callable[..., tuple[Any, ...]]:
        """A forward that names its arguments, as torch.export wants to see them."""

        def forward(**given: Tensor) -> tuple[Any, ...]:
            values = (given[name] if held is None else getattr(self, _key(held)) for name, held in self.inputs)
            return tuple(self.program(*values))

        kind = inspect.Parameter.KEYWORD_ONLY
        forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # functions take attributes
            [inspect.Parameter(name, kind) for name, held in self.inputs if held is None]
        )
        return forward


def graph_from_json(nodes: Sequence[Mapping[str, Any]]) -> tuple[fx.Graph, list[tuple[str, str | None]]]:
    """A graph of stored nodes, and its inputs, each with the name of its tensor, or None where the caller gives it.

    Raises:
        ArtifactError: a node calls what is no op that an artefact may name.
    """
    graph, known, inputs = fx.Graph(), {}, []
    for entry in nodes:
        if "input" in entry:
            inputs.append((entry["input"], entry.get("tensor")))
            known[entry["input"]] = graph.placeholder(entry["input"])
        elif "output" in entry:
            graph.output(tuple(_value(entry["output"], known)))
        else:
            args = tuple(_value(entry["args"], known))
            kwargs = {key: _value(value, known) for key, value in entry["kwargs"].items()}
            known[entry["name"]] = graph.create_node(
                "call_function", _op(entry["op"]), args, kwargs, name=entry["name"]
            )
    return graph, inputs


def _example(node: fx.Node) -> dict[str, Any]:
    """Shape, dtype and dynamic axes of a caller's input."""
    from lorac.ir.graph.symbolic_shapes import constant_size

    value = node.meta["val"]
    if not isinstance(value, Tensor):
        raise _unstorable(f"a program whose input '{node.name}' is a {type(value).__name__}")
    return {
        "shape": [size if isinstance(size, int) else int(size.node.hint) for size in value.shape],
        "dtype": str(value.dtype).removeprefix("torch."),
        "dynamic": [axis for axis, size in enumerate(value.shape) if constant_size(size) is None],
    }


def _made(entry: Mapping[str, Any]) -> Tensor:
    """An input of the kind: ones are valid as ids and as a mask, noise as anything else."""
    dtype = _value({"dtype": entry["dtype"]}, {})
    if not dtype.is_floating_point:
        return torch.ones(entry["shape"], dtype=dtype)
    return torch.randn(entry["shape"], generator=torch.Generator().manual_seed(0)).to(dtype)


def operand_to_json(value: Any) -> Any:
    """An operand as JSON."""
    if isinstance(value, fx.Node):
        return {_NODE: value.name}
    if isinstance(value, tuple | list):
        return [operand_to_json(item) for item in value]
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


def _value(stored: Any, known: Mapping[str, fx.Node]) -> Any:
    if isinstance(stored, list):
        return [_value(item, known) for item in stored]
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
        raise ArtifactError(f"the program has the operand {stored!r}, which is none lorac stores")
    return found


def _name_of(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    module = getattr(target, "__module__", "").removeprefix("_")
    name = getattr(target, "__name__", "")
    if module in _FUNCTIONS and name in _FUNCTION_NAMES:
        return f"{module}.{name}"
    raise _unstorable(f"a captured program that calls {target}")


def _op(name: str) -> Callable[..., Any]:
    """The op registered as ``<namespace>.<name>.<overload>``, or a function on numbers."""
    namespace, _, rest = name.partition(".")
    if namespace in _FUNCTIONS and rest in _FUNCTION_NAMES:
        function: Callable[..., Any] = getattr(_FUNCTIONS[namespace], rest)
        return function
    packet, _, overload = rest.partition(".")
    found: Any = None
    if namespace in _NAMESPACES and packet.isidentifier():
        found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
    if not isinstance(found, torch._ops.OpOverload) or any(a.name in _FORBIDDEN for a in found._schema.arguments):
        raise ArtifactError(f"the program calls '{name}', which is no op that an artefact may name")
    return found


def _key(name: str) -> str:
    """A tensor's name as an attribute's."""
    return "held_" + name.replace(".", "/")
