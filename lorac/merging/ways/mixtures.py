"""LoRAs side by side in one adapter: behind a router that is not trained, or with weights to be trained."""

from collections.abc import Sequence
from dataclasses import dataclass

from lorac.argument_types import Count, Positive
from lorac.frontend.model_view import ModelView
from lorac.merging.way import AdaptersWay
from lorac.variants.adapter import Adapter
from lorac.variants.arrow import Arrow
from lorac.variants.learned_cat import LearnedCat


@dataclass(frozen=True, kw_only=True)
class ArrowRouting(AdaptersWay):
    """An `Arrow`: each token is given to the adapters whose largest direction it has most of.

    Attributes:
        top_k: number of adapters per token.
        temperature: flattens their shares.
    """

    top_k: Count = 3
    temperature: Positive = 1.0

    name = "arrow"
    paper = Arrow.paper

    def assemble(
        self, adapters: Sequence[Adapter], weights: Sequence[float], name: str, view: ModelView | None
    ) -> Adapter:
        loras = self.to_loras(adapters, view, weights)
        return Arrow.from_loras(loras, top_k=self.top_k, temperature=self.temperature, name=name)


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
