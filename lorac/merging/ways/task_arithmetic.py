"""Task arithmetic: the weighted sum of changes."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lorac.merging.way import SumWay


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(SumWay):
    """Σ wᵢ·Δᵢ; in the space of factors PEFT's ``linear``, which also multiplies each B by the others' A."""

    name = "task_arithmetic"
    paper = "Editing Models with Task Arithmetic, arXiv 2212.04089"
    measures: ClassVar[bool] = False

    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        return weights
