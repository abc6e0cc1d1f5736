"""Measures of adapters: the rank and the size of each site's change, and the overlap of two adapters.

Everything is computed in float64, from factors where a change has them. With ΔW = W' − W, norms are Frobenius's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorac.adapters.adapter_sites import add_adapted_modules
from lorac.adapters.factors import factors
from lorac.adapters.fit import list_faults
from lorac.adapters.lora_conversion import compute_delta
from lorac.adapters.truncation import (
    compute_product_svd,
    find_rank,
    measure_effective_rank,
    truncate_matrix,
    truncate_product,
)
from lorac.argument_types import check_type
from lorac.errors import AdapterError, BaseNeeded, CompileError, LoracError, SiteError
from lorac.frontend.model_view import Model, ModelView
from lorac.ir.algebra.changes import Change, Delta, LowRank, Sparse, factors_of
from lorac.variants.adapter import Adapter

_LARGEST = 1024
"""The longest side of a matrix whose singular values are all computed for a report."""


@dataclass(frozen=True)
class SiteMeasures:
    """The change of one site at strength 1; a field is None where only the base tells it.

    Attributes:
        form: its normal form: "low-rank", "sparse", "delta", "dense", "branch" or, before the sequence, "prompt"; None:
            not known.
        rank: the number of its singular values above rounding; None also for large dense changes and for branches.
        effective_rank: exp of the entropy of its singular values (Roy, Vetterli 2007): the number that matter.
        norm: ‖ΔW‖.
        share: ‖ΔW‖ / ‖W‖.
    """

    form: str | None = None
    rank: int | None = None
    effective_rank: float | None = None
    norm: float | None = None
    share: float | None = None


@dataclass(frozen=True)
class AdapterMeasures:
    """An adapter in numbers.

    Attributes:
        sites: by path.
        mismatches: the parts that do not fit the model, in words; empty where all do, or no model is given.
    """

    sites: Mapping[str, SiteMeasures]
    mismatches: tuple[str, ...] = ()


@dataclass(frozen=True)
class SiteDifference:
    """The changes of one site by two adapters; a field is None if it needs an adapter that does not touch the site.

    Attributes:
        first, second: ‖ΔW₁‖ and ‖ΔW₂‖.
        difference: ‖ΔW₁ − ΔW₂‖.
        cosine: ⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖·‖ΔW₂‖); 0 where one is 0.
        outputs: cosines of the principal angles between the spaces of outputs that they write to, falling.
        inputs: the same for the spaces of inputs that they read.
        bias: ‖e₁ − e₂‖, of the changes of the bias.
    """

    first: float | None = None
    second: float | None = None
    difference: float | None = None
    cosine: float | None = None
    outputs: tuple[float, ...] = ()
    inputs: tuple[float, ...] = ()
    bias: float = 0.0

    @property
    def overlap(self) -> tuple[float, float]:
        """The mean squared cosines of outputs and of inputs: 1 where one space holds the other, 0 where orthogonal."""
        both = (self.outputs, self.inputs)
        outputs, inputs = (sum(cosine * cosine for cosine in cosines) / (len(cosines) or 1) for cosines in both)
        return outputs, inputs


def inspect(adapter: Adapter, model: Model | None = None) -> AdapterMeasures:
    """Measure an adapter's change at each site, and list the parts that would not fit a model.

    Args:
        adapter: of any method; only read.
        model: the base, or several by name; only read. Without it, changes that depend on the base have no norm.

    Raises:
        WrongType: ``adapter`` is not an adapter.
    """
    check_type(adapter, Adapter, "the adapter of lorac.inspect", next_step="give an adapter: lorac.load_adapter(path)")
    view = None if model is None else add_adapted_modules(adapter, ModelView.of(model))
    mismatches = () if view is None else tuple(error.what for error in list_faults(adapter, view))
    return AdapterMeasures({path: _measure_site(adapter, path, view) for path in adapter.tensors}, mismatches)


@torch.no_grad()
def diff(
    first: Adapter, second: Adapter, model: Model | None = None, *, rank: int | None = None
) -> dict[str, SiteDifference]:
    """Compare two adapters at every site that either touches, at strength 1.

    Args:
        first, second: adapters of methods that edit weights; only read. Their methods and ranks may differ.
        model: the base, or several by name, needed where ``lorac.factors`` needs it.
        rank: how many of the largest singular values span the compared spaces; default: all above rounding.

    Returns:
        Site path -> difference, in the order of the first adapter, then of the second; then replaced parameters by
        name, whose own norms need the model.

    Raises:
        SiteError: they touch no site in common.
        AdapterError: they were made for layers of other sizes.
        CompileError: a method does not edit weights.
        BaseNeeded: as ``lorac.factors``.
    """
    step = "give adapters: lorac.load_adapter(path)"
    for adapter in (first, second):
        check_type(adapter, Adapter, "an adapter of lorac.diff", next_step=step)
    if first.tensors.keys().isdisjoint(second.tensors):
        raise SiteError(
            f"'{first.name}' and '{second.name}' touch no site in common",
            next_step="give two adapters of one model; `lorac inspect FILE` prints the sites of one",
            code="site_not_found",
        )
    view = None if model is None else ModelView.of(model)
    found = {}
    for path in dict.fromkeys([*first.tensors, *second.tensors]):
        one, other = (read_change(adapter, path, view) for adapter in (first, second))
        whole = [change for change in (one, other) if change is not None and _factors_of(change, None) is None]
        weight = view.base.weight(view.sites[path]).double() if view is not None and whole else None
        found[path] = _compare(path, one, other, weight, rank)
    for name in dict.fromkeys([*first.replaced, *second.replaced]):
        mine, theirs = first.replaced.get(name), second.replaced.get(name)
        if mine is not None and theirs is not None:
            _check_shapes(name, tuple(mine.shape), tuple(theirs.shape))
        base = None if view is None else view.tensor(name)
        found[name] = SiteDifference(_distance(mine, base), _distance(theirs, base), _distance(mine, theirs))
    return found


def read_change(adapter: Adapter, path: str, view: ModelView | None) -> Change | None:
    """Return the change of one site in float64, or None where the adapter does not touch it."""
    if path not in adapter.tensors:
        return None
    alone = replace(adapter, tensors={path: adapter.tensors[path]}, replaced={}, provenance={})
    return factors(alone, view, dtype=torch.float64)[path]


def _measure_site(adapter: Adapter, path: str, view: ModelView | None) -> SiteMeasures:
    try:
        change = read_change(adapter, path, view)
    except CompileError:
        return SiteMeasures("prompt" if adapter.variant.prompt else "branch")
    except LoracError:  # it does not fit the model, or depends on it
        return SiteMeasures() if view is None else _measure_site(adapter, path, None)
    assert change is not None
    weight = None if view is None else view.base.weight(view.sites[path]).double()
    form = {LowRank: "low-rank", Sparse: "sparse", Delta: "delta"}.get(type(change), "dense")
    parts = _factors_of(change, weight)
    if parts is None:
        return SiteMeasures(form, change.rank if isinstance(change, LowRank) else None)
    b, a = parts
    norm = _norm(b, a)
    share = None if weight is None else norm / (float(torch.linalg.vector_norm(weight)) or 1.0)
    if a is None and max(b.shape) > _LARGEST:
        return SiteMeasures(form, None, None, norm, share)
    s = torch.linalg.svdvals(b) if a is None else compute_product_svd(b, a)[1]
    ranks = [find_rank(one, 0.0) if bool(one.any()) else 0 for one in s.reshape(-1, s.shape[-1])]
    effective = [measure_effective_rank(one) for one in s.reshape(-1, s.shape[-1])]
    return SiteMeasures(form, max(ranks), sum(effective) / len(effective), norm, share)


def _factors_of(change: Change, weight: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
    """Return B (out, r) and A (r, in) of a pair, ΔW and None of others, or None where only the base tells ΔW."""
    if (pair := factors_of(change)) is not None:
        return pair
    if weight is not None:
        return compute_delta(change, weight), None
    return (change.delta, None) if isinstance(change, Delta) else None


def _compare(
    path: str, one: Change | None, other: Change | None, weight: Tensor | None, rank: int | None
) -> SiteDifference:
    first, second = (None if change is None else require_parts(path, change, weight) for change in (one, other))
    if first is None or second is None:
        one_norm, other_norm = (None if parts is None else _norm(*parts) for parts in (first, second))
        return SiteDifference(one_norm, other_norm)
    _check_shapes(path, *((*b.shape[:-1], (b if a is None else a).shape[-1]) for b, a in (first, second)))
    norms = _norm(*first), _norm(*second)
    difference, inner = _subtract(first, second)
    size = norms[0] * norms[1]
    cosine = inner / size if size else 0.0
    spaces = []
    for b, a in (first, second):
        cut = truncate_matrix(b, rank) if a is None else truncate_product(b, a, rank)
        width = cut.rank if bool(cut.b.any()) else 0
        spaces.append((torch.linalg.qr(cut.b[..., :width])[0], torch.linalg.qr(cut.a[..., :width, :].mT)[0]))
    # The cosines of the principal angles between the outputs of the changes, and between their inputs.
    found = (torch.linalg.svdvals(x.mT @ y) for x, y in zip(*spaces, strict=True))
    outputs, inputs = (tuple(cosines.reshape(-1).clamp(max=1).tolist()) for cosines in found)
    shifts = [change.e for change in (one, other) if change is not None and change.e is not None]
    bias = shifts[0] - shifts[1] if len(shifts) == 2 else next(iter(shifts), torch.zeros(()))
    return SiteDifference(
        norms[0], norms[1], difference, cosine, outputs, inputs, float(torch.linalg.vector_norm(bias))
    )


def _distance(one: Tensor | None, other: Tensor | None) -> float | None:
    return None if one is None or other is None else float(torch.linalg.vector_norm(one.double() - other.double()))


def _check_shapes(path: str, one: tuple[int, ...], other: tuple[int, ...]) -> None:
    if one != other:
        raise AdapterError(
            f"the adapters were made for different layers at '{path}': {one} and {other}",
            next_step="give two adapters of one model",
            code="shape_mismatch",
        )


def require_parts(path: str, change: Change, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return B (out, r) and A (r, in) of a pair, or ΔW (out, in) and None.

    Raises:
        BaseNeeded: only the base, which is not given, tells ΔW.
    """
    found = _factors_of(change, weight)
    if found is None:
        raise BaseNeeded(
            f"only the base tells the change of the weight of '{path}'", next_step="pass model=, the adapters' base"
        )
    return found


def _norm(b: Tensor, a: Tensor | None) -> float:
    """Return ‖B·A‖ without the product, or ‖B‖."""
    return float(torch.linalg.vector_norm(b if a is None else torch.linalg.qr(b).R @ torch.linalg.qr(a.mT).R.mT))


def _subtract(first: tuple[Tensor, Tensor | None], second: tuple[Tensor, Tensor | None]) -> tuple[float, float]:
    """Return ‖ΔW₁ − ΔW₂‖ and ⟨ΔW₁, ΔW₂⟩."""
    (b1, a1), (b2, a2) = first, second
    if a1 is not None and a2 is not None:
        joined = _norm(torch.cat([b1, -b2], dim=-1), torch.cat([a1, a2], dim=-2))
        return joined, float(((b1.mT @ b2) * (a1 @ a2.mT)).sum())
    whole = [b if a is None else b @ a for b, a in (first, second)]
    return float(torch.linalg.vector_norm(whole[0] - whole[1])), float((whole[0] * whole[1]).sum())
