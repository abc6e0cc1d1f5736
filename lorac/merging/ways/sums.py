"""The weighted mean of changes, and their weighted sum: exact (cat), truncated to a rank (svd), or in a space."""

from typing import ClassVar

from torch import Tensor

from lorac.errors import ChoiceError
from lorac.ir.algebra.changes import Change
from lorac.merging.spaces import sum_changes
from lorac.merging.terms import SiteTerms
from lorac.merging.way import SiteWay, SumWay


class Linear(SumWay):
    """Σ wᵢ·Δᵢ / Σ wᵢ.

    Attributes:
        normalize: whether to divide by Σ wᵢ; default: True, except in the space of factors, where PEFT does not.
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


class TaskArithmetic(SumWay):
    """Σ wᵢ·Δᵢ; in the space of factors this is PEFT's ``linear``, which also multiplies B by other adapters' A."""

    name = "task_arithmetic"
    paper = "Editing Models with Task Arithmetic, arXiv 2212.04089"
    measures: ClassVar[bool] = False

    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        return weights


class Cat(SiteWay):
    """Σ wᵢ·Δᵢ, as a weighted swap computes it. LoRAs become one LoRA whose rank is the sum of their ranks."""

    name = "cat"
    paper = "PEFT's add_weighted_adapter"

    def merge_site(self, terms: SiteTerms) -> Change:
        return sum_changes(terms.weights, terms)


class SVD(SiteWay):
    """The first components of Σ wᵢ·Δᵢ, computed from factors; the default rank is the adapters' largest."""

    name = "svd"
    paper = Cat.paper

    def merge_site(self, terms: SiteTerms) -> Change:
        return sum_changes(terms.weights, terms)

    def result_rank(self, terms: SiteTerms) -> int | None:
        if self.rank is not None or self.tolerance is not None:
            return self.rank
        return max(1, *(a.shape[-2] for _, a in terms.pairs))
