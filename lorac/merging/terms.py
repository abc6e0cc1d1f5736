"""The changes of several adapters at one site, in the forms that ways of merging read."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorac.adapters.lora_conversion import compute_delta
from lorac.errors import require_base, unmergeable_error
from lorac.ir.algebra.changes import Change, Delta, Dense, LowRank, SparseSum, compose, factors_of
from lorac.variants.adapter import Adapter
from lorac.variants.low_rank import ScaledRank


@dataclass(frozen=True, eq=False)
class ScaledPair:
    """The change scale·B·A of a weight, as a LoRA stores it; low-rank methods that store no such pair have scale 1.

    Attributes:
        b: B (out, r).
        a: A (r, in).
        scale: the method's scale, such as alpha/r.
    """

    b: Tensor
    a: Tensor
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class SiteTerms:
    """The changes of one site.

    Attributes:
        path: path of the site, or the name of a parameter that belongs to no site.
        adapters: all adapters, in their order.
        weights: weights of the adapters.
        changes: each adapter's change at the site; None if it does not change the site.
        read_weight: function that reads W (out, in); None without a model.
        generator: source of the random choices.
    """

    path: str
    adapters: Sequence[Adapter]
    weights: Sequence[float]
    changes: Sequence[Change | None]
    read_weight: Callable[[], Tensor] | None
    generator: torch.Generator

    @functools.cached_property
    def deltas(self) -> Tensor:
        """W' − W of each adapter (N, out, in); 0 for an adapter that does not change the site.

        Raises:
            BaseNeeded: a change depends on W, and there is no model.
        """
        found = [None if change is None else self.delta(change) for change in self.changes]
        shape = next(one for one in found if one is not None)
        return torch.stack([torch.zeros_like(shape) if one is None else one for one in found])

    @functools.cached_property
    def shifts(self) -> Tensor | None:
        """The changes of the bias (N, out); None if no adapter changes it."""
        found = [None if change is None else change.e for change in self.changes]
        first = next((e for e in found if e is not None), None)
        return None if first is None else torch.stack([torch.zeros_like(first) if e is None else e for e in found])

    @functools.cached_property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """B (out, r), with every scale, and A (r, in) of each adapter; rank 0 for no change.

        Raises:
            CompileError: a change is not a product of factors.
        """
        found = [None if change is None else self._pair(i, change) for i, change in enumerate(self.changes)]
        b, a = next(pair for pair in found if pair is not None)
        return [(b[..., :0], a[..., :0, :]) if pair is None else pair for pair in found]

    def scaled_pairs(self) -> list[ScaledPair | None]:
        """Return the factors of each adapter as stored; None for an adapter that does not change the site.

        Raises:
            CompileError: a change is not a product of factors.
        """
        found: list[ScaledPair | None] = []
        for i, change in enumerate(self.changes):
            if change is None:
                found.append(None)
                continue
            b, a = self._pair(i, change)
            tensors, variant = self.adapters[i].tensors.get(self.path, {}), self.adapters[i].variant.at_path(self.path)
            if isinstance(variant, ScaledRank) and tensors.keys() - {"lora_bias"} == {"lora_A", "lora_B"}:
                b, a = tensors["lora_B"].detach().to(b), tensors["lora_A"].detach().to(a)
                found.append(ScaledPair(b, a, variant.scale))
            else:
                found.append(ScaledPair(b, a))
        return found

    def gram(self) -> Tensor:
        """Return the inner products (N, N) of the changes, summed over weight and bias, in float64."""
        shifts = 0 if self.shifts is None else inner_products(self.shifts.double())
        if any(change is not None and factors_of(change) is None for change in self.changes):
            return inner_products(self.deltas.double()) + shifts
        pairs = [(b.double(), a.double()) for b, a in self.pairs]
        products = [[((b.mT @ d) * (a @ c.mT)).sum() for d, c in pairs] for b, a in pairs]
        return torch.stack([torch.stack(row) for row in products]) + shifts

    def delta(self, change: Change) -> Tensor:
        """Return W' − W (out, in) of one change.

        Raises:
            BaseNeeded: the change depends on W, and there is no model.
        """
        if isinstance(change, Delta):
            return change.delta
        if (pair := factors_of(change)) is not None:
            return pair[0] @ pair[1]
        read_weight = require_base(
            self.read_weight,
            f"the change of '{self.path}' as a matrix depends on the base",
            next_step="pass model=, the base that the adapters were trained on",
        )
        return compute_delta(change, read_weight())

    def _pair(self, index: int, change: Change) -> tuple[Tensor, Tensor]:
        if (pair := factors_of(change)) is not None:
            return pair
        adapter = self.adapters[index]
        raise unmergeable_error(
            f"the change of '{self.path}' by '{adapter.name}' ({adapter.variant.name}) is not a product of two factors",
            next_step="give space='deltas', which takes any change, or factors: lorac.to_lora(adapter, model, rank=…)",
        )


def inner_products(tensors: Tensor) -> Tensor:
    """Return the inner products (N, N) of stacked tensors (N, …)."""
    flat = tensors.flatten(1)
    return flat @ flat.mT


def shape_of(change: Change) -> tuple[int, ...] | None:
    """Return the shape (out, in) of the weight that a change is for; None if the change does not determine it."""
    if isinstance(change, LowRank):
        return change.b.shape[-1], change.a.shape[-2]
    matrix = change.weight if isinstance(change, Dense) else change.delta if isinstance(change, Delta) else None
    return None if matrix is None else tuple(matrix.shape[-2:])


def scale_change(change: Change, strength: float) -> Change:
    """Return strength·(W' − W) of a change that does not contain W'."""
    if isinstance(change, SparseSum):
        shift = None if change.e is None else strength * change.e
        return SparseSum(tuple((strength * t, term) for t, term in change.terms), shift)
    scaled = compose([(strength, change)], refuse_weight)
    assert scaled is not None
    return scaled


def refuse_weight() -> Tensor:
    """Stand for the function that reads the base, for changes that do not depend on it."""
    raise AssertionError("a change of this form needs no base")
