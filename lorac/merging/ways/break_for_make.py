"""Break-for-Make: the style's half of the factors with the content's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lorac.errors import ChoiceError
from lorac.frontend.model_view import ModelView
from lorac.merging.way import AdaptersWay
from lorac.variants.adapter import Adapter
from lorac.variants.plp import PLP


@dataclass(frozen=True, kw_only=True)
class BreakForMake(AdaptersWay):
    """A `PLP` with the second adapter's factors (style), but the trained part of the first's down factor (content)."""

    name = "break_for_make"
    paper = PLP.paper
    least: ClassVar[int] = 2
    most: ClassVar[int | None] = 2

    def assemble(
        self, adapters: Sequence[Adapter], weights: Sequence[float], name: str, view: ModelView | None
    ) -> Adapter:
        if {*weights, self.scale} != {1.0} or self.rank is not None or self.tolerance is not None:
            raise ChoiceError(
                "halves of factors are joined as they are, without weights, scale= and rank=",
                next_step="leave these out",
            )
        content, style = adapters
        return PLP.join(content, style, name=name)
