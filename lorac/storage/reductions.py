"""Reductions as JSON and back: whoever prepares adapters of structures that were met before needs no tracing for it.

To trace a formula takes torch's compiler, whose import alone takes longer than to load an artefact. What was traced is
a small graph of ops, stored as programs are (``lorac.storage.program``). What training needs besides is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from lorac.errors import ArtifactError, Unavailable
from lorac.ir.algebra.reduction import BRANCH, DENSE, LOW_RANK, SPARSE, Reduction
from lorac.storage.program import call_to_json, graph_from_json, operand_to_json

_FORMS = frozenset({LOW_RANK, SPARSE, DENSE, BRANCH})
_NAMES = ("params", "outputs", "shared", "reasons")
_ROOM, _SLACK = 16, 1 << 16
"""How many times the values that it reads a reduction may ask for by number, and how many besides."""


def reduction_to_json(reduction: Reduction) -> dict[str, Any] | None:
    """A reduction; None where it holds a constant, or what else has no plain form."""
    try:
        nodes = [_node(node) for node in reduction.graph.graph.nodes if reduction.form != BRANCH]
    except Unavailable:
        return None
    names = {name: list(getattr(reduction, name)) for name in _NAMES}
    told = {"form": reduction.form, "rank": reduction.rank, "reads_weight": reduction.reads_weight}
    return {**told, **names, "common": sorted(reduction.common), "nodes": nodes}


def _node(node: fx.Node) -> dict[str, Any]:
    if node.op == "placeholder":
        return {"input": node.name}
    if node.op == "output":
        return {"output": operand_to_json(node.args[0])}
    if node.op == "call_function":
        return call_to_json(node)
    raise Unavailable(
        f"a reduction that holds the constant '{node.target}' cannot be stored",
        next_step="have the formula make it: torch.full, torch.arange and the like are stored as calls",
    )


def reduction_from_json(stored: Mapping[str, Any]) -> Reduction:
    """The inverse of ``reduction_to_json``.

    Raises:
        ArtifactError: it is of no known form, or calls what is no op that an artefact may name.
    """
    if stored["form"] not in _FORMS:
        raise ArtifactError(f"a stored reduction has the form {stored['form']!r}, which there is not")
    graph = graph_from_json(stored["nodes"])[0] if stored["form"] != BRANCH else fx.Graph()
    names: dict[str, Any] = {name: tuple(map(str, stored[name])) for name in _NAMES}
    return Reduction(
        form=stored["form"],
        graph=fx.GraphModule(nn.Module(), graph),
        rank=int(stored["rank"]),
        reads_weight=bool(stored["reads_weight"]),
        common=frozenset(map(str, stored["common"])),
        **names,
    )


def check_sizes(reduction: Reduction, weight: tuple[int, int], tensors: Iterable[Tensor]) -> None:
    """Refuse a reduction that names sizes beyond all measure of what it reads, before it makes anything of them.

    Args:
        reduction: as it was read.
        weight: shape (out, in) of W.
        tensors: one example per parameter; only shapes are read.

    Raises:
        ArtifactError: it does.
    """
    most = _ROOM * (math.prod(weight) + sum(tensor.numel() for tensor in tensors)) + _SLACK
    for node in reduction.graph.graph.nodes:
        operands = (*node.args, *node.kwargs.values())
        named = [item for item in operands if isinstance(item, list | tuple)]
        if not node.all_input_nodes:  # it makes something of numbers alone
            named.append([item for item in operands if type(item) is int])
        if any(_product(sizes) > most for sizes in named):
            raise ArtifactError(f"a stored reduction asks {node.target} for sizes that are beyond all measure")


def _product(sizes: Iterable[Any]) -> int:
    return math.prod(max(abs(size), 1) for size in sizes if type(size) is int)
