"""A smaller model to train on: heads and hidden units taken out, or single weights set to 0."""

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorac.errors import OptionError, SiteError, not_one_of
from lorac.frontend.model_view import ModelView
from lorac.ir.sites.patterns import find_layer_index, select_sites
from lorac.ir.sites.site import SiteKind
from lorac.training.initialisation.gradients import Loss, sum_gradients
from lorac.training.loram.pruning_record import PruningRecord
from lorac.training.loram.units import (
    HEADS,
    UnitGroup,
    count_kept_units,
    find_unit_groups,
    sum_unit_scores,
    unit_positions,
)

SCORES = ("magnitude", "gradient", "random")


@dataclass(frozen=True)
class PrunedModel:
    """A smaller model with a record of its pruning.

    Attributes:
        model: the smaller model, with weights of its own.
        kept: path of a pruned layer -> its remaining rows and columns.
        masks: name of a parameter -> mask of its nonzero weights, for a model with masked weights.
        sizes: its size compared with the large model's.
    """

    model: nn.Module
    kept: Mapping[str, PruningRecord]
    masks: Mapping[str, Tensor]
    sizes: "SizeComparison"


@dataclass(frozen=True)
class SizeComparison:
    """Parameters and bytes of a large and a smaller model; masked weights still count as bytes.

    Attributes:
        parameters: (large, small), without masked ones.
        bytes: (large, small), in memory.
    """

    parameters: tuple[int, int]
    bytes: tuple[int, int]

    def __str__(self) -> str:
        (large, small), (before, after) = self.parameters, self.bytes
        return (
            f"parameters {large:,} -> {small:,} ({large / small:.2f}x fewer) · memory {before / 2**20:.1f} -> "
            f"{after / 2**20:.1f} MiB ({before / after:.2f}x less)"
        )


def prune(
    model: nn.Module,
    *,
    heads: float = 0.5,
    hidden: float = 0.5,
    layers: Collection[int] | None = None,
    by: str = "magnitude",
    batches: Iterable[object] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
) -> PrunedModel:
    """Copy a model without a share of its heads and hidden units; embeddings, norms and the residual stream stay whole.

    Args:
        model: the large model; left unchanged.
        heads: share of the key and value heads to remove, with the query heads that read them.
        hidden: share of the hidden units to remove.
        layers: the numbers of the layers to prune; default: all.
        by: the score of a unit: ``"magnitude"``, the sum of squares of a unit's weights; ``"gradient"``, that of
            |w·∂loss/∂w| over batches (LLM-Pruner); ``"random"``.
        batches, loss: as in ``lorac.training.initialisation``, for ``"gradient"``.
        seed: for ``"random"``.

    Raises:
        OptionError: a share is out of range, or ``by`` is unknown.
        SiteError: nothing can be pruned (``find_unit_groups``), or a layer is quantised.
        AdapterError, SiteError: as ``lorac.training.initialisation.sum_gradients``.
    """
    _check_share("heads", heads)
    _check_share("hidden", hidden)
    groups = [
        group
        for group in find_unit_groups(model)
        if layers is None or find_layer_index(next(iter(group.rows)), ()) in layers
    ]
    if not groups:
        raise OptionError(f"layers={sorted(layers or ())} names no layer", next_step="give numbers from 0 on")
    sites = ModelView.of(model).sites
    quantised = [
        path for group in groups for path in (*group.rows, *group.columns) if path in sites and sites[path].packed
    ]
    if quantised:
        raise SiteError(
            f"'{quantised[0]}' is quantised ({sites[quantised[0]].packed}), and rows of its weight cannot be removed",
            next_step="prune the model before it is quantised",
        )
    scores = _score_weights(
        model, [path for group in groups for path in (*group.rows, *group.columns)], by, batches, loss, seed
    )
    left: list[tuple[UnitGroup, Tensor]] = []
    for group in groups:
        most = count_kept_units(group, heads if group.kind == HEADS else hidden)
        left.append((group, sum_unit_scores(group, scores).topk(most).indices.sort().values))
    kept = make_pruning_records(model, left)
    small = _slice_model(model, kept)
    _update_module_sizes(small, left, everywhere=layers is None)
    return PrunedModel(small, kept, {}, _compare_sizes(model, small, {}))


def mask(
    model: nn.Module,
    share: float = 0.5,
    *,
    pattern: tuple[int, int] | None = None,
    targets: str | tuple[str, ...] = "all-linear",
) -> PrunedModel:
    """Copy a model with its smallest weights set to 0; its shapes stay, so ``recover`` changes nothing.

    Args:
        model: the large model; left unchanged.
        share: share of each layer's weights to set to 0.
        pattern: (n, m): set n of every m adjacent weights of a row to 0, such as (4, 8), instead of ``share``.
        targets: the layers, as in ``lorac.LoRA``.

    Raises:
        OptionError: the share is out of range, or the pattern does not fit.
        SiteError: a target is not a linear layer, or the targets match nothing.
    """
    _check_share("share", share)
    view = ModelView.of(model)
    small, masks = copy.deepcopy(model), {}
    for site in select_sites(view.sites, targets, heads=view.output_layers):
        if site.kind is not SiteKind.LINEAR or site.weight is None:
            raise SiteError(f"'{site.path}' is not a linear layer", next_step="narrow targets=")
        weight = view.base.weight(site)
        zeros, block = (int(weight.numel() * share), weight.numel()) if pattern is None else pattern
        if not 0 <= zeros <= block or weight.numel() % block or (pattern and weight.shape[1] % block):
            raise OptionError(
                f"pattern={pattern} does not divide the {weight.shape[1]} columns of '{site.path}'",
                next_step="give (n, m) with m a divisor of the columns and n at most m",
            )
        blocks = weight.abs().reshape(-1, block)
        smallest = blocks.topk(zeros, dim=1, largest=False).indices
        masks[site.weight] = site.store(torch.ones_like(blocks).scatter(1, smallest, 0).reshape(weight.shape))
    with torch.no_grad():
        for name, kept in masks.items():
            small.get_parameter(name).mul_(kept)
    return PrunedModel(small, {}, masks, _compare_sizes(model, small, masks))


def _check_share(name: str, share: float) -> None:
    if not 0 <= share < 1:
        raise OptionError(
            f"{name}={share} is not a share that can be removed", next_step="give a number from 0 to below 1"
        )


def _score_weights(
    model: nn.Module, paths: list[str], by: str, batches: Iterable[object] | None, loss: Loss | None, seed: int
) -> dict[str, Tensor]:
    """Score every weight, by path of its layer."""
    if by not in SCORES:
        raise not_one_of("there is no way of pruning by", by, SCORES)
    weights = {path: model.get_parameter(f"{path}.weight") for path in paths}
    if by == "magnitude":
        return {path: weight.detach().float().square() for path, weight in weights.items()}
    if by == "random":
        generator = torch.Generator().manual_seed(seed)
        return {path: torch.rand(weight.shape, generator=generator) for path, weight in weights.items()}
    sites = ModelView.of(model).sites
    found = sum_gradients(model, {path: sites[path] for path in paths}, batches or (), loss)
    return {path: (weight.detach() * found.sums[path]).abs().float() for path, weight in weights.items()}


def make_pruning_records(model: nn.Module, left: list[tuple[UnitGroup, Tensor]]) -> dict[str, PruningRecord]:
    """Return the rows and columns that each layer keeps, from the numbers of the units that stay."""
    found: dict[str, PruningRecord] = {}
    for group, units in left:
        for path, width in group.rows.items():
            rows, columns = model.get_parameter(f"{path}.weight").shape
            found[path] = PruningRecord((rows, columns), unit_positions(units, width), torch.arange(columns))
        for path, width in group.columns.items():
            rows, columns = model.get_parameter(f"{path}.weight").shape
            found[path] = PruningRecord((rows, columns), torch.arange(rows), unit_positions(units, width))
    return found


def _slice_model(model: nn.Module, kept: Mapping[str, PruningRecord]) -> nn.Module:
    """Copy a model with its layers pruned; removed weights are never copied."""
    memo: dict[int, object] = {}
    for path, one in kept.items():
        layer: Any = model.get_submodule(path)
        memo[id(layer.weight)] = _make_parameter(layer.weight, layer.weight.detach()[one.rows][:, one.columns])
        if layer.bias is not None:
            memo[id(layer.bias)] = _make_parameter(layer.bias, layer.bias.detach()[one.rows])
    small = copy.deepcopy(model, memo)
    for path in kept:
        layer = small.get_submodule(path)
        layer.out_features, layer.in_features = layer.weight.shape
    return small


def _make_parameter(parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.clone(), requires_grad=parameter.requires_grad)


def _update_module_sizes(small: nn.Module, left: list[tuple[UnitGroup, Tensor]], *, everywhere: bool) -> None:
    """Set the new numbers of units in modules and configurations; layers that share a configuration get copies."""
    found: dict[str, set[int]] = {}
    for group, units in left:
        if group.kind == HEADS:
            queries = len(units) * group.shared
            numbers = {"num_heads": queries, "num_attention_heads": queries, "num_key_value_heads": len(units)}
        else:
            numbers = {"intermediate_size": len(units), "ffn_dim": len(units)}
        owner: Any = small.get_submodule(group.owner)
        _set_attributes(owner, numbers)
        if hasattr(owner, "config"):
            owner.config = copy.copy(owner.config)
            _set_attributes(owner.config, numbers)
        for name, number in numbers.items():
            found.setdefault(name, set()).add(number)
    if everywhere and hasattr(small, "config"):
        _set_attributes(small.config, {name: min(numbers) for name, numbers in found.items() if len(numbers) == 1})


def _set_attributes(holder: Any, numbers: Mapping[str, int]) -> None:
    """Set the numbers that a module or configuration has; the size of a head stays."""
    if hasattr(holder, "hidden_size") and hasattr(holder, "num_attention_heads"):
        holder.head_dim = getattr(holder, "head_dim", None) or holder.hidden_size // holder.num_attention_heads
    for name, number in numbers.items():
        if isinstance(getattr(holder, name, None), int):
            setattr(holder, name, number)


def _compare_sizes(large: nn.Module, small: nn.Module, masks: Mapping[str, Tensor]) -> SizeComparison:
    gone = sum(int(mask.numel() - mask.count_nonzero()) for mask in masks.values())
    before, after = ([(p.numel(), p.nbytes) for p in model.parameters()] for model in (large, small))
    counts = sum(count for count, _ in before), sum(count for count, _ in after) - gone
    return SizeComparison(counts, (sum(size for _, size in before), sum(size for _, size in after)))
