"""Ways of merging several adapters into one; each is a frozen dataclass of options in ``lorac.merging.ways``.

A way subclasses the class that reads its input: ``SumWay`` the inner products of the changes, ``CombiningWay`` the
changes entry by entry, ``SiteWay`` the changes in their own forms, ``AdaptersWay`` whole adapters. For all of them
``lorac.merging.merge`` handles loading, sites that only some adapters change, dtypes, seeds, truncation and the form of
the result.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Self, dataclass_transform

import torch
from torch import Tensor

from lorac.adapters.lora_conversion import to_lora
from lorac.argument_types import Count, OneOf, Rate, Seed, check_fields
from lorac.frontend.model_view import ModelView
from lorac.ir.algebra.changes import Change
from lorac.merging.pruning import Part, match_norms, per_adapter
from lorac.merging.spaces import SPACES, sum_changes
from lorac.merging.terms import SiteTerms
from lorac.variants.adapter import Adapter
from lorac.variants.lora import LoRA

Numbers = Sequence[float]


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
@dataclass(frozen=True, kw_only=True)
class Way(ABC):
    """The options that all ways have.

    Attributes:
        rank: the result's largest rank at a site; the result is then the nearest LoRA of that rank. None: no limit.
        tolerance: the largest relative error at a site; the result is then the LoRA of the smallest such ranks, up to
            ``rank``. Without rank and tolerance the result is exact.
        scale: factor of the merged change, mergekit's ``lambda``.
        seed: seed of random choices; sites draw in the order of their names.
    """

    rank: Count | None = None
    tolerance: Rate | None = None
    scale: float = 1.0
    seed: Seed = 0

    name: ClassVar[str]
    paper: ClassVar[str]
    """Title and arXiv number, or the place where the way is defined."""
    least: ClassVar[int] = 1
    most: ClassVar[int | None] = None
    """The least and the most adapters that the way takes; None: no limit."""

    def __init_subclass__(cls) -> None:
        """Make every subclass a frozen dataclass."""
        super().__init_subclass__()
        dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self) -> None:
        check_fields(self, self.name)

    @property
    @abstractmethod
    def reads(self) -> str:
        """The parts of the adapters that the way reads, in words."""

    @property
    def keeps_one(self) -> bool:
        """Whether one adapter at weight 1 is returned unchanged, whatever its method."""
        return self.rank is None and self.tolerance is None and self.scale == 1


class SiteWay(Way):
    """A way that merges each site separately."""

    reads = "each site's change in its own form"

    def survey(self, terms: Iterable[SiteTerms]) -> Self:
        """Return this way after a pass over all sites, before any site is merged; by default the same way."""
        return self

    @abstractmethod
    def merge_site(self, terms: SiteTerms) -> Change:
        """Return the merged change of one site, without ``scale`` and ``rank``."""

    def merge_replaced(self, terms: SiteTerms) -> Change:
        """Return the merged change of parameters that adapters only replace, which have no factors."""
        return sum_changes(terms.weights, terms)

    def result_rank(self, terms: SiteTerms) -> int | None:
        """Return the largest rank that the result may have at a site; None: no limit."""
        return self.rank


class CombiningWay(SiteWay):
    """A way that combines tensors of equal shape.

    Attributes:
        space: the tensors to combine: whole changes (``deltas``), stored factors, each separately (``factors``, as PEFT
            does), changes in one basis (``knots``) or in two (``core``).
    """

    space: Annotated[str, OneOf(tuple(SPACES))] = "deltas"

    reads = "changes, entry by entry, in a space"

    @abstractmethod
    def combine(self, tensors: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
        """Combine tensors (N, …) with weights (N,) into one tensor (…); an adapter without a change has zeros."""

    def merge_site(self, terms: SiteTerms) -> Change:
        return SPACES[self.space](self.combine, terms)

    def merge_replaced(self, terms: SiteTerms) -> Change:
        return replace(self, space="deltas").merge_site(terms)

    @property
    def is_like_peft(self) -> bool:
        """Whether options without a value follow PEFT: in the space of factors, which only PEFT has."""
        return self.space == "factors"


class SumWay(CombiningWay):
    """A way whose result is Σ cᵢ·Δᵢ, so that a sum of low-rank changes stays low-rank."""

    measures: ClassVar[bool] = True
    """Whether c depends on the inner products; otherwise they are not computed, and are zeros."""
    reads = "inner products of the changes; factors stay factors"

    @abstractmethod
    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        """Return c (N,) from the inner products (N, N) of the changes and the weights (N,), all in float64."""

    def combine(self, tensors: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
        flat = tensors.flatten(1).double()
        found = self.coefficients(flat @ flat.mT, weights.double())
        return torch.tensordot(found.to(tensors), tensors, dims=1)

    def merge_site(self, terms: SiteTerms) -> Change:
        if self.space != "deltas":
            return super().merge_site(terms)
        count = len(terms.weights)
        gram = terms.gram() if self.measures else torch.zeros(count, count, dtype=torch.float64)
        return sum_changes(self.coefficients(gram, gram.new_tensor(terms.weights)).tolist(), terms)


class PruningWay(CombiningWay):
    """A way that prunes entries of each change and adds up the rest.

    Attributes:
        density: the share of the entries that is kept: for all adapters, or one per adapter.
        normalize: whether to divide by the sum of the weights; default: as mergekit, which does for ties and della; in
            the space of factors as PEFT.
        rescale: whether to scale the kept entries up to the magnitude of all entries; default: True for random ways.
        rescale_norm: ``l1``: to the same sum of absolute values, as mergekit; ``density``: by 1/density, as PEFT.
    """

    density: Part = 1.0
    normalize: bool | None = None
    rescale: bool | None = None
    rescale_norm: Annotated[str | None, OneOf(("l1", "density"))] = None

    normalizes: ClassVar[bool] = False
    """mergekit's default of ``normalize``."""
    rescales: ClassVar[bool] = False
    """The default of ``rescale``."""

    @abstractmethod
    def mask(self, tensor: Tensor, density: float, index: int, generator: torch.Generator) -> Tensor:
        """Return a mask of the entries that are kept in the tensor of the adapter with this index."""

    @property
    def keeps_one(self) -> bool:
        return super().keeps_one and min(per_adapter(self.density, 1)) == 1

    def prune(self, tensors: Tensor, generator: torch.Generator) -> Tensor:
        """Return tensors (N, …) with pruned entries set to zero."""
        densities = per_adapter(self.density, len(tensors))
        return torch.stack([self._prune(t, densities[i], i, generator) for i, t in enumerate(tensors)])

    def _prune(self, tensor: Tensor, density: float, index: int, generator: torch.Generator) -> Tensor:
        if density >= 1 or not tensor.any():
            return tensor
        kept = tensor * self.mask(tensor, density, index, generator)
        if not (self.rescales if self.rescale is None else self.rescale):
            return kept
        by_density = self.is_like_peft if self.rescale_norm is None else self.rescale_norm == "density"
        return kept / density if by_density else match_norms(kept, tensor)


class PrunedSumWay(PruningWay):
    """A way that adds up pruned changes: Σ wᵢ·Δ̂ᵢ."""

    def combine(self, tensors: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
        total = torch.tensordot(weights, self.prune(tensors, generator), dims=1)
        return total / _nonzero(weights.sum()) if self.normalize else total


class SignElectionWay(PruningWay):
    """A way that elects a sign for each entry, and adds up the pruned changes with that sign.

    Attributes:
        majority_sign_method: the sum of the changes (``total``) or their number (``frequency``) elects the sign.
        weighted: whether signs are elected by weighted changes, and the sum is divided by weights; otherwise by changes
            and their number, as in PEFT. Default: True, except in the space of factors.
    """

    majority_sign_method: Annotated[str, OneOf(("total", "frequency"))] = "total"
    weighted: bool | None = None

    def combine(self, tensors: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
        pruned = self.prune(tensors, generator)
        column = weights.view(-1, *[1] * (tensors.dim() - 1))
        weighs = not self.is_like_peft if self.weighted is None else self.weighted
        voters = pruned * column if weighs else pruned
        votes = (voters if self.majority_sign_method == "total" else voters.sign()).sum(0)
        agreeing = voters.sign() == torch.where(votes >= 0, 1.0, -1.0)
        total = (pruned * column * agreeing).sum(0)
        if not (self.normalizes or self.is_like_peft if self.normalize is None else self.normalize):
            return total
        return total / _nonzero((agreeing * column if weighs else agreeing.to(total.dtype)).sum(0))


class AdaptersWay(Way):
    """A way that combines whole adapters, such as LoRAs with a router."""

    reads = "whole adapters"

    def to_loras(
        self, adapters: Sequence[Adapter], view: ModelView | None, weights: Sequence[float] | None = None
    ) -> list[Adapter]:
        """Convert adapters to LoRAs, of the way's rank if it has one; multiply their changes by ``scale`` and weights.

        Raises:
            CompileError: an adapter is no LoRA, and there is neither ``rank`` nor ``tolerance``.
            BaseNeeded: a change depends on the base, and there is no view of it.
        """
        exact = self.rank is None and self.tolerance is None
        loras = [
            one
            if exact and isinstance(one.variant, LoRA)
            else to_lora(one, view, rank=self.rank, tolerance=self.tolerance)
            for one in adapters
        ]
        if weights is None:
            return loras
        scaled = []
        for lora, weight in zip(loras, weights, strict=True):
            strength = self.scale * weight
            tensors = {path: {**at, "lora_B": strength * at["lora_B"]} for path, at in lora.tensors.items()}
            scaled.append(replace(lora, tensors=tensors))
        return scaled

    @abstractmethod
    def assemble(self, adapters: Sequence[Adapter], weights: Numbers, name: str, view: ModelView | None) -> Adapter:
        """Return the combined adapter called ``name``; ``view`` is the base, or None."""


def _nonzero(divisor: Tensor) -> Tensor:
    return torch.where(divisor.abs() < 1e-8, torch.ones_like(divisor), divisor)
