"""The sizes of a captured program: which of them vary and what they are called."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

Tensor = torch.Tensor
BATCH = "batch"
_SYMBOL = re.compile(r"[su]\d+")


def axis_names(program: ExportedProgram, dynamic_shapes: Mapping[str, Any]) -> dict[str, str]:
    """torch's symbol for a size -> its name: the ``Dim``'s, batch for a first axis, else input and axis.

    Args:
        program: as captured.
        dynamic_shapes: input -> axis -> ``Dim`` or hint, as torch.export takes them.
    """
    names: dict[str, str] = {}
    sizes = ((name, axis, str(size)) for name, v in _inputs(program).items() for axis, size in enumerate(v.shape))
    for name, axis, symbol in sizes:
        if not _SYMBOL.fullmatch(symbol) or symbol in names:
            continue
        axes = dynamic_shapes.get(name)
        told = getattr(axes.get(axis), "__name__", None) if isinstance(axes, Mapping) else None
        usual = BATCH if axis == 0 and BATCH not in names.values() else f"{name}.{axis}"
        names[symbol] = told if told is not None and told not in names.values() else usual
    return names


def renamed(text: str, names: Mapping[str, str]) -> str:
    """A size as text, such as ``2*s77``, with its symbols replaced by their names."""
    return _SYMBOL.sub(lambda match: names.get(match.group(), match.group()), text)


def _inputs(program: ExportedProgram) -> dict[str, Tensor]:
    """The examples of the caller's tensors, by input."""
    given = {getattr(s.arg, "name", "") for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT}
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.name in given}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}
