"""Whole adapters combined into one: with an untrained router, with trainable weights, or half of each factor."""

from collections.abc import Sequence
from typing import ClassVar

from lorac.argument_types import Count, Positive
from lorac.errors import ChoiceError
from lorac.frontend.model_view import ModelView
from lorac.merging.way import AdaptersWay, Numbers
from lorac.variants.adapter import Adapter
from lorac.variants.arrow import Arrow
from lorac.variants.learned_cat import LearnedCat
from lorac.variants.plp import PLP


class ArrowRouting(AdaptersWay):
    """An `Arrow`: each token is routed to the adapters whose largest direction it has the largest component along.

    Attributes:
        top_k: number of adapters per token.
        temperature: divisor of the scores before the softmax.
    """

    top_k: Count = 3
    temperature: Positive = 1.0

    name = "arrow"
    paper = Arrow.paper

    def assemble(self, adapters: Sequence[Adapter], weights: Numbers, name: str, view: ModelView | None) -> Adapter:
        loras = self.to_loras(adapters, view, weights)
        return Arrow.from_loras(loras, top_k=self.top_k, temperature=self.temperature, name=name)


class LearnedWeights(AdaptersWay):
    """A `LearnedCat`: Σ wᵢ·Δᵢ, with weights that training changes at each site."""

    name = "learned_cat"
    paper = LearnedCat.paper

    def assemble(self, adapters: Sequence[Adapter], weights: Numbers, name: str, view: ModelView | None) -> Adapter:
        return LearnedCat.from_loras(
            self.to_loras(adapters, view), weights=[w * self.scale for w in weights], name=name
        )


class BreakForMake(AdaptersWay):
    """A `PLP` with the second adapter's factors (style) and the trained part of the first's down factor (content)."""

    name = "break_for_make"
    paper = PLP.paper
    least: ClassVar[int] = 2
    most: ClassVar[int | None] = 2

    def assemble(self, adapters: Sequence[Adapter], weights: Numbers, name: str, view: ModelView | None) -> Adapter:
        if {*weights, self.scale} != {1.0} or self.rank is not None or self.tolerance is not None:
            raise ChoiceError(
                "this method joins halves of factors as they are, and takes no weights, scale= or rank=",
                next_step="leave these out",
            )
        content, style = adapters
        return PLP.join(content, style, name=name)
