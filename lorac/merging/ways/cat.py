"""Concatenation of factors: the exact weighted sum."""

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
