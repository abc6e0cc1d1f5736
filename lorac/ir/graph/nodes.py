"""The metadata of nodes, which fx leaves untyped: an example of the value, its module and its source line."""

import re

from torch import Tensor, fx

from lorac.source_lines import is_user_code


def get_example(node: object) -> Tensor:
    """Return the fake tensor that describes a node's value."""
    assert isinstance(node, fx.Node)
    value: Tensor = node.meta["val"]
    return value


def describe_type(value: Tensor) -> tuple[object, ...]:
    """Return a key that is equal for values of one dtype and shape."""
    return (value.dtype, *map(str, value.shape))


SLOTS_KEYWORD = "lorac"
"""The keyword argument that holds all slots, a dict by public name; also the key of a node's own metadata."""
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
