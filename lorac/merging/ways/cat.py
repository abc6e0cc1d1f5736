"""The exact weighted sum of changes, by concatenation of their factors, and the nearest LoRA of a rank to it."""

from dataclasses import dataclass

from lorac.ir.algebra.changes import Change
from lorac.merging.spaces import sum_changes
from lorac.merging.terms import SiteTerms
from lorac.merging.way import SiteWay


@dataclass(frozen=True, kw_only=True)
class Cat(SiteWay):
    """Σ wᵢ·Δᵢ: what a weighted swap computes. LoRAs become one whose rank is the sum of theirs."""

    name = "cat"
    paper = "PEFT's add_weighted_adapter"

    def merge_site(self, terms: SiteTerms) -> Change:
        return sum_changes(terms.weights, terms)


@dataclass(frozen=True, kw_only=True)
class SVD(SiteWay):
    """The first components of Σ wᵢ·Δᵢ, without a product of its factors; the default rank is the parts' largest."""

    name = "svd"
    paper = Cat.paper

    def merge_site(self, terms: SiteTerms) -> Change:
        return sum_changes(terms.weights, terms)

    def result_rank(self, terms: SiteTerms) -> int | None:
        if self.rank is not None or self.tolerance is not None:
            return self.rank
        return max(1, *(a.shape[-2] for _, a in terms.pairs))
