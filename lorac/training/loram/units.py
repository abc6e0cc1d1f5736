"""Prunable units of a model: attention heads and hidden units, each spanning coupled layers.

A unit is a block of rows of some layers and of columns of others. In grouped attention it is a key and value head with
all query heads that read it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorac.errors import SiteError

HEADS, HIDDEN = "heads", "hidden"
_ATTENTION = (("q_proj", "k_proj", "v_proj"), ("o_proj", "out_proj"))
"""Names of attention layers: heads are rows of the first, and columns of one of the second."""
_MLP = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("up_proj",), "down_proj"),
    (("fc1",), "fc2"),
    (("w1", "w3"), "w2"),
)
"""Names of MLP layers: hidden units are rows of the first, and columns of the second."""


@dataclass(frozen=True)
class UnitGroup:
    """Units of one module.

    Attributes:
        owner: path of the module.
        kind: ``"heads"`` or ``"hidden"``.
        count: number of units.
        rows: path of a layer -> rows per unit.
        columns: path of a layer -> columns per unit.
        shared: number of query heads per key and value head; 1 for hidden units.
    """

    owner: str
    kind: str
    count: int
    rows: Mapping[str, int] = field(default_factory=dict)
    columns: Mapping[str, int] = field(default_factory=dict)
    shared: int = 1


def find_unit_groups(model: nn.Module) -> list[UnitGroup]:
    """Find all prunable units, in module order.

    Raises:
        SiteError: no module has layers of known names.
    """
    found = [
        group
        for path, module in model.named_modules()
        for group in (*_attention_groups(path, module), *_mlp_groups(path, module))
    ]
    if not found:
        raise SiteError(
            f"{type(model).__name__} has no attention of q_proj, k_proj, v_proj and o_proj, and no perceptron of "
            "gate_proj, up_proj and down_proj, whose heads and units could be pruned",
            next_step="set single weights to 0 instead, by `loram.mask`",
        )
    return found


def _attention_groups(path: str, module: nn.Module) -> Iterator[UnitGroup]:
    inner, outer = _ATTENTION
    out = next((name for name in outer if _find_linear(module, name)), None)
    size = getattr(module, "head_dim", None)
    if out is None or not size or not all(_find_linear(module, name) for name in inner):
        return
    queries, keys = (_find_linear(module, name).out_features // size for name in inner[:2])
    each = queries // keys
    wide = {f"{path}.{name}": size for name in inner[1:]}
    yield UnitGroup(
        path, HEADS, keys, {f"{path}.{inner[0]}": each * size, **wide}, {f"{path}.{out}": each * size}, shared=each
    )


def _mlp_groups(path: str, module: nn.Module) -> Iterator[UnitGroup]:
    for inner, outer in _MLP:
        if _find_linear(module, outer) and all(_find_linear(module, name) for name in inner):
            start = f"{path}." if path else ""
            rows = {f"{start}{name}": 1 for name in inner}
            yield UnitGroup(path, HIDDEN, _find_linear(module, outer).in_features, rows, {f"{start}{outer}": 1})
            return


def _find_linear(module: nn.Module, name: str) -> Any:
    layer = getattr(module, name, None)
    return layer if isinstance(layer, nn.Linear) else None


def count_kept_units(group: UnitGroup, share: float) -> int:
    """Return the number of units that stay when a share of them goes, rounded as in the authors' code; at least one.

    Hidden units: I − ⌈I·share⌉; heads of grouped attention: H − ⌊H·share⌋; of plain attention: ⌊H·(1 − share)⌋.
    """
    exact = group.count * share
    if group.kind == HIDDEN:
        left = group.count + int(-exact // 1)
    else:
        left = group.count - int(exact) if group.shared > 1 else int(group.count * (1 - share))
    return max(left, 1)


def sum_unit_scores(group: UnitGroup, scores: Mapping[str, Tensor]) -> Tensor:
    """Return the score of each unit (count,) from those of the weights, (out, in) by path of a layer."""
    total = sum(scores[path].sum(1).unflatten(0, (group.count, -1)).sum(1) for path in group.rows)
    total = total + sum(scores[path].sum(0).unflatten(0, (group.count, -1)).sum(1) for path in group.columns)
    assert isinstance(total, Tensor)
    return total


def unit_positions(units: Tensor, width: int) -> Tensor:
    """Return the rows, or columns, of some units of a layer."""
    return (units[:, None] * width + torch.arange(width)).flatten()
