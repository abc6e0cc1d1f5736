"""The nearest LoRA of a rank to the exact weighted sum."""

from dataclasses import dataclass

from lorac.ir.algebra.changes import Change
from lorac.merging.spaces import sum_changes
from lorac.merging.terms import SiteTerms
from lorac.merging.way import SiteWay


@dataclass(frozen=True, kw_only=True)
class SVD(SiteWay):
    """The first components of Σ wᵢ·Δᵢ, without a product of its factors; the default rank is the parts' largest."""

    name = "svd"
    paper = "PEFT's add_weighted_adapter"

    def merge_site(self, terms: SiteTerms) -> Change:
        return sum_changes(terms.weights, terms)

    def result_rank(self, terms: SiteTerms) -> int | None:
        if self.rank is not None or self.tolerance is not None:
            return self.rank
        return max(1, *(a.shape[-2] for _, a in terms.pairs))
