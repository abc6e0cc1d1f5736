"""PVeRA: VeRA whose hidden values are drawn from learned distributions during training.

arXiv 2512.07703; shapes, start values and the draw of A and B as in PEFT.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lorac.variants._random_projections import RandomProjections
from lorac.variants.base import BranchVariant, Context, Dropout, Params, Tensor


@dataclass(frozen=True, kw_only=True)
class PVeRA(RandomProjections, BranchVariant):
    """``y' = y + λ_b∘B·μ``, μ = λ_d[:r]∘A[:r]·x; in training μ + σ∘ε for μ, σ = exp(λ_d[r:]∘A[r:]·x / 2).

    A is (2r, in), λ_d (2r,). The noise ε ~ N(0, 1) is drawn from torch's generator, as in PEFT; without noise the
    method is affine and can be merged.
    """

    name = "pvera"
    paper = "PVeRA: Probabilistic Vector-Based Random Matrix Adaptation, arXiv 2512.07703"
    dropout_place = Dropout.NONE  # the formula applies dropout, since it is not affine in training
    halves = 2  # for the mean and the log-variance
    samples = True

    def branch(self, x: Tensor, y: Tensor, p: Params, ctx: Context) -> Tensor:
        if ctx.training:
            x = F.dropout(x, self.dropout)
        down, scale = p.pvera_A[:, : x.shape[-1]], p.pvera_lambda_d
        hidden = scale[: self.r] * F.linear(x, down[: self.r])
        if ctx.training:
            deviation = torch.exp(0.5 * (scale[self.r :] * F.linear(x, down[self.r :])))
            hidden = hidden + torch.randn_like(deviation) * deviation
        return y + p.pvera_lambda_b * F.linear(hidden, p.pvera_B[: y.shape[-1]])
