"""Sizes of traced values as text: torch's symbols, and the names that stand for them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

import torch

from lorac.ir.graph.graph import Graph

Tensor = torch.Tensor
BATCH = "batch"
_SYMBOL = re.compile(r"[su]\d+")


def rename_symbols(text: str, names: Mapping[str, str]) -> str:
    """A size as text, such as ``2*s77``, with its symbols replaced by their names."""
    return _SYMBOL.sub(lambda match: names.get(match.group(), match.group()), text)


def describe_types(graph: Graph, inputs: Collection[str], outputs: Sequence[str]) -> dict[str, str]:
    """Input or output of a graph -> its dtype and sizes, those that vary by their names.

    Args:
        graph: a captured graph.
        inputs: names of the caller's inputs.
        outputs: names of its outputs, in order.
    """
    given = {node.name: node for node in graph.placeholders() if node.name in inputs}
    answered = next(node for node in reversed(graph.fx.nodes) if node.op == "output").args[0]
    named = zip(outputs, list(answered)[-len(outputs) :], strict=True) if outputs else ()
    nodes = {**given, **{name: node for name, node in named if isinstance(node, torch.fx.Node)}}
    values = {name: node.meta.get("val") for name, node in nodes.items()}
    return {name: _describe_type(value, graph.axes) for name, value in values.items() if isinstance(value, Tensor)}


def _describe_type(value: Tensor, names: Mapping[str, str]) -> str:
    sizes = ", ".join(rename_symbols(str(size), names) for size in value.shape)
    return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"


def constant_size(size: int | torch.SymInt) -> int | None:
    """A size of a traced value that does not vary; None where it does.

    torch keeps the symbol of an axis that was to vary and that the trace fixed, as one that stands for a number.
    """
    return size if isinstance(size, int) else size.node.maybe_as_int()
