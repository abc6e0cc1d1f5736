"""Learned concatenation: LoRAs side by side with a weight of each to be trained in every layer."""

from collections.abc import Sequence
from dataclasses import dataclass

from lorac.frontend.model_view import ModelView
from lorac.merging.way import AdaptersWay
from lorac.variants.adapter import Adapter
from lorac.variants.learned_cat import LearnedCat


@dataclass(frozen=True, kw_only=True)
class LearnedWeights(AdaptersWay):
    """A `LearnedCat`: Σ wᵢ·Δᵢ with weights that training changes at each site."""

    name = "learned_cat"
    paper = LearnedCat.paper

    def assemble(
        self, adapters: Sequence[Adapter], weights: Sequence[float], name: str, view: ModelView | None
    ) -> Adapter:
        return LearnedCat.from_loras(
            self.to_loras(adapters, view), weights=[w * self.scale for w in weights], name=name
        )
