"""The nearest LoRA of a rank to the exact weighted sum."""

from __future__ import annotations

from dataclasses import dataclass

from lorac.merging.terms import SiteTerms
from lorac.merging.ways.cat import Cat


@dataclass(frozen=True, kw_only=True)
class SVD(Cat):
    """The first components of Σ wᵢ·Δᵢ, without a product of its factors; the default rank is the parts' largest."""

    name = "svd"

    def result_rank(self, terms: SiteTerms) -> int | None:
        if self.rank is not None or self.tolerance is not None:
            return self.rank
        return max(1, *(a.shape[-2] for _, a in terms.pairs))
