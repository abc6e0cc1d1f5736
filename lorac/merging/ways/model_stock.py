"""Model Stock: the mean of changes, shortened by how far they are from parallel."""

from dataclasses import dataclass

from torch import Tensor

from lorac.merging.way import SumWay
from lorac.merging.ways.sphere import normalise


@dataclass(frozen=True, kw_only=True)
class ModelStock(SumWay):
    """t·mean(wᵢ·Δᵢ) with t = N·c / (1 + (N − 1)·c), c the mean cosine of two changes."""

    name = "model_stock"
    paper = "Model Stock: All we need is just a few fine-tuned models, arXiv 2403.19522"

    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        count = len(weights)
        if count == 1:
            return weights
        cosines = normalise(gram)[0] * (weights.sign()[:, None] * weights.sign())
        mean = cosines.triu(1).sum() / (count * (count - 1) / 2)
        return weights * mean / (1 + (count - 1) * mean)
