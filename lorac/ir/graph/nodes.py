"""The untyped metadata of fx nodes: an example of the value, the module, the source line, the tensor."""

import re
from collections.abc import Iterable

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from lorac.source_lines import is_user_code

_SIZES = frozenset({torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default, torch.ops.aten.sym_stride.int})


def get_example(node: object) -> Tensor:
    """Return the fake tensor that describes a node's value."""
    assert isinstance(node, fx.Node)
    value: Tensor = node.meta["val"]
    return value


def find_user_inputs(program: ExportedProgram) -> dict[str, fx.Node]:
    """Return the inputs that a call gives a program, by name."""
    names = set(program.graph_signature.user_inputs)
    return {node.name: node for node in program.graph.nodes if node.op == "placeholder" and node.name in names}


def find_input_examples(program: ExportedProgram) -> dict[str, Tensor]:
    """Return the examples of the tensor inputs that a call gives a program, by name."""
    values = {name: node.meta.get("val") for name, node in find_user_inputs(program).items()}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def find_stored_tensors(program: ExportedProgram) -> dict[fx.Node, Tensor]:
    """Return the placeholders of a program's parameters, buffers and constants -> their tensors."""
    held = {**program.constants, **program.state_dict}
    names = {getattr(spec.arg, "name", ""): str(spec.target) for spec in program.graph_signature.input_specs}
    found = {node: held.get(names.get(node.name, "")) for node in program.graph.nodes if node.op == "placeholder"}
    return {node: tensor for node, tensor in found.items() if isinstance(tensor, Tensor)}


def find_sources(values: Iterable[object]) -> set[fx.Node]:
    """Return the nodes among these values, and all nodes from which they are computed."""
    found: set[fx.Node] = set()
    waiting = [*values]
    while waiting:
        node = waiting.pop()
        if isinstance(node, fx.Node) and node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def find_dependents(nodes: Iterable[fx.Node], first: Iterable[fx.Node]) -> set[fx.Node]:
    """Return these nodes and all nodes computed from them; a path through a size does not count."""
    found = set(first)
    for node in nodes:
        if node.op == "call_function" and node.target not in _SIZES and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def describe_type(value: Tensor) -> tuple[object, ...]:
    """Return a key that is equal for values with the same dtype and shape."""
    return (value.dtype, *map(str, value.shape))


SLOTS_KEYWORD = "lorac"
"""The keyword argument for all slots, a dict by public name; also the key of lorac's metadata in a node."""
_PROVENANCE = ("nn_module_stack", "stack_trace", "from_node")


def copy_provenance(node: fx.Node, origin: fx.Node) -> None:
    """Copy the module path and source line of one node to another."""
    for key in _PROVENANCE:
        if key in origin.meta:
            node.meta[key] = origin.meta[key]
    site = origin.meta.get("custom", {}).get(SLOTS_KEYWORD)
    if site is not None:
        node.meta["custom"] = {SLOTS_KEYWORD: site}


def find_source_line(node: fx.Node) -> str | None:
    """Return ``file:line: code`` of the model's innermost line that made ``node``; None where torch recorded none."""
    entries = re.findall(r'File "(.+?)", line (\d+), in .*\n\s*(.*)', node.meta.get("stack_trace") or "")
    return next((f"{f}:{line}: {code}" for f, line, code in reversed(entries) if is_user_code(f)), None)


def find_module_path(node: fx.Node) -> str:
    """Return the path of the innermost module that made ``node``; empty for the model itself."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""
