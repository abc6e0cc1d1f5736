"""Reductions as JSON, so that adapters of known structures are prepared without tracing.

Tracing a formula needs torch's compiler, whose import takes longer than loading an artifact. A trace is a small graph
of ops, stored in the form of programs (``lorac.storage.program``). Fields for training alone are left out.
"""

import math
from collections.abc import Iterable

from torch import Tensor, fx, nn

from lorac.errors import ArtifactError, Unavailable
from lorac.ir.algebra.reduction import BRANCH, DELTA, DENSE, LOW_RANK, SPARSE, Reduction
from lorac.storage.program import check_sizes as check_graph_sizes
from lorac.storage.program import nodes_from_json, nodes_to_json
from lorac.storage.strict_json import JsonObject

_FORMS = frozenset({LOW_RANK, SPARSE, DELTA, DENSE, BRANCH})
_NAMES = ("params", "outputs", "shared", "reasons")
_ROOM, _SLACK = 16, 1 << 16
"""The limit of a size in a reduction: ``_ROOM`` times the number of values that it reads, plus ``_SLACK``."""


def reduction_to_json(reduction: Reduction) -> JsonObject | None:
    """Return a reduction as JSON; None for one with a constant or another value that has no JSON form."""
    try:
        nodes = [] if reduction.form == BRANCH else nodes_to_json(reduction.graph.graph)
    except Unavailable:
        return None
    names = {name: list(getattr(reduction, name)) for name in _NAMES}
    entries = {"form": reduction.form, "rank": reduction.rank, "reads_weight": reduction.reads_weight}
    return {**entries, **names, "common": sorted(reduction.common), "nodes": nodes}


def reduction_from_json(stored: JsonObject) -> Reduction:
    """Return the reduction that ``reduction_to_json`` wrote.

    Raises:
        ArtifactError: the form is unknown, or the reduction calls something other than an op that artifacts may name.
    """
    if stored["form"] not in _FORMS:
        raise ArtifactError(f"a stored reduction has the unknown form {stored['form']!r}")
    graph = nodes_from_json(stored["nodes"])[0] if stored["form"] != BRANCH else fx.Graph()
    names: JsonObject = {name: tuple(map(str, stored[name])) for name in _NAMES}
    return Reduction(
        form=stored["form"],
        graph=fx.GraphModule(nn.Module(), graph),
        rank=int(stored["rank"]),
        reads_weight=bool(stored["reads_weight"]),
        common=frozenset(map(str, stored["common"])),
        **names,
    )


def check_sizes(reduction: Reduction, weight: tuple[int, int], tensors: Iterable[Tensor]) -> None:
    """Refuse a reduction with sizes far larger than the values that it reads, before it allocates anything.

    Args:
        reduction: the reduction, as it was read.
        weight: shape (out, in) of W.
        tensors: one example per parameter; only shapes are read.

    Raises:
        ArtifactError: a size is too large.
    """
    most = _ROOM * (math.prod(weight) + sum(tensor.numel() for tensor in tensors)) + _SLACK
    check_graph_sizes(reduction.graph.graph, most)
