"""Barycentric interpolation on a sphere."""

from dataclasses import dataclass

from torch import Tensor

from lorac.errors import ChoiceError
from lorac.merging.way import SumWay
from lorac.merging.ways._sphere import measure, move, normalise, rescale


@dataclass(frozen=True, kw_only=True)
class MultiSlerp(SumWay):
    """The mean of the changes' directions in the plane that touches the sphere there, times their mean length.

    Attributes:
        normalize_weights: divide the weights by their sum.
    """

    normalize_weights: bool = True

    name = "multislerp"
    paper = "mergekit"

    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        weights = weights / weights.sum() if self.normalize_weights else weights
        cosines, lengths = normalise(gram)
        length = measure(weights, cosines)
        if length == 0:
            raise ChoiceError(
                "the directions of the changes cancel, so that they have no mean", next_step="give others"
            )
        mean = weights / length
        tangent = weights - (weights @ cosines @ mean) * mean
        return rescale(move(mean, tangent, cosines), lengths, weights)
