"""Sizes of traced values as text: torch's symbols, and the names that stand for them."""

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lorac.ir.graph.graph import Graph

SYMBOL = re.compile(r"\b[su]\d+\b")
"""torch's names for sizes that vary."""


def rename_symbols(text: str, names: Mapping[str, str]) -> str:
    """Replace the symbols in a size as text, such as ``2*s77``, by their names."""
    return SYMBOL.sub(lambda match: names.get(match.group(), match.group()), text)


def set_types(graph: Graph) -> None:
    """Describe dtypes and sizes of a graph's inputs and outputs in its interface."""
    inputs, outputs = graph.interface.inputs, graph.interface.outputs
    placeholders = {node.name: node for node in graph.placeholders() if node.name in inputs}
    (results,) = graph.fx.output_node().args
    assert isinstance(results, tuple | list)
    named = zip(outputs, list(results)[-len(outputs) :], strict=True) if outputs else ()
    nodes = {**placeholders, **{name: node for name, node in named if isinstance(node, torch.fx.Node)}}
    values = {name: node.meta.get("val") for name, node in nodes.items()}
    types = {name: _describe_type(value, graph.axes) for name, value in values.items() if isinstance(value, Tensor)}
    graph.interface = replace(graph.interface, types=types)


def _describe_type(value: Tensor, names: Mapping[str, str]) -> str:
    sizes = ", ".join(rename_symbols(str(size), names) for size in value.shape)
    return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"


def constant_size(size: int | torch.SymInt) -> int | None:
    """Return a size of a traced value that does not vary; None for one that varies.

    torch keeps the symbol of an axis that the trace fixed, and lets it stand for a number.
    """
    return size if isinstance(size, int) else size.node.maybe_as_int()
