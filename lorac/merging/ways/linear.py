"""The weighted mean of changes, and their weighted sum (task arithmetic)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lorac.errors import ChoiceError
from lorac.merging.way import SumWay


@dataclass(frozen=True, kw_only=True)
class Linear(SumWay):
    """Σ wᵢ·Δᵢ / Σ wᵢ.

    Attributes:
        normalize: divide by Σ wᵢ; default: True, but in the space of factors, where PEFT does not.
    """

    normalize: bool | None = None

    name = "linear"
    paper = "Model soups: averaging weights of multiple fine-tuned models, arXiv 2203.05482"
    measures: ClassVar[bool] = False

    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        if not (not self.is_like_peft if self.normalize is None else self.normalize):
            return weights
        if weights.sum() == 0:
            raise ChoiceError(
                "the weights add up to 0, so that there is no mean",
                next_step="give others, or normalize=False for their sum",
            )
        return weights / weights.sum()


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(SumWay):
    """Σ wᵢ·Δᵢ; in the space of factors PEFT's ``linear``, which also multiplies each B by the others' A."""

    name = "task_arithmetic"
    paper = "Editing Models with Task Arithmetic, arXiv 2212.04089"
    measures: ClassVar[bool] = False

    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        return weights
