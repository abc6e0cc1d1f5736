"""VeRA: vector-based random matrix adaptation.

Kopiczko et al. 2024, arXiv 2310.11454; shapes, start values and the draw of A and B as in PEFT.
"""

from dataclasses import dataclass

from lorac.variants._random_projections import RandomProjections
from lorac.variants.base import Params, Tensor, WeightVariant


@dataclass(frozen=True, kw_only=True)
class VeRA(RandomProjections, WeightVariant):
    """``W' = W + diag(λ_b)·B·diag(λ_d)·A``: A and B are random, frozen, and shared by all sites."""

    name = "vera"
    paper = "VeRA: Vector-based Random Matrix Adaptation, arXiv 2310.11454"
    halves = 1

    def weight(self, W: Tensor, p: Params) -> Tensor:
        rows, columns = W.shape
        up = p.vera_lambda_b[:, None] * p.vera_B[:rows]
        down = p.vera_lambda_d[:, None] * p.vera_A[:, :columns]
        return W + up @ down
