"""Magnitude: trained norms of the rows or columns of a weight, the part of DoRA that works with any method.

LyCORIS: ``weight_decompose`` of all its algorithms (https://github.com/KohakuBlueleaf/LyCORIS); Liu et al. 2024, arXiv
2402.09353, with column norms.
"""

from dataclasses import dataclass

import torch

from lorac.variants._conv_kernels import kernel_columns, require_one_group
from lorac.variants.base import MATRIX_KINDS, Params, ParamSpec, Site, SiteKind, Tensor, WeightVariant
from lorac.variants.initialisers import row_norms
from lorac.variants.low_rank import rescale_rows


@dataclass(frozen=True, kw_only=True)
class Magnitude(WeightVariant):
    """``W' = (m/n)∘W`` with n the norms of the rows (out,), constant in the backward pass.

    In a ``Chain`` after another method, W is that method's W'.

    Attributes:
        columns: whether n are the norms of the columns (in,), at a convolution of the input channels.
    """

    columns: bool = False

    name = "magnitude"
    paper = "DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353; LyCORIS, arXiv 2309.14859"
    kinds = MATRIX_KINDS - {SiteKind.EMBEDDING}

    def check(self, site: Site) -> None:
        super().check(site)
        if self.columns:
            require_one_group("magnitude with columns=True", site)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        if not self.columns:
            return {"magnitude": ParamSpec((site.out_features,), row_norms)}
        channels = kernel_columns(site)[0]
        return {
            "magnitude": ParamSpec(
                (channels,),
                lambda context: torch.linalg.vector_norm(_channel_rows(context.weight(), channels), dim=1),
            )
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        if not self.columns:
            return rescale_rows(W, p.magnitude)
        channels = _channel_rows(W, p.magnitude.shape[0])
        return rescale_rows(channels, p.magnitude).unflatten(1, (W.shape[0], -1)).transpose(0, 1).flatten(1)


def _channel_rows(W: Tensor, channels: int) -> Tensor:
    """Return W (out, channels·taps) as a matrix with one row (out·taps) per channel."""
    return W.unflatten(1, (channels, -1)).transpose(0, 1).flatten(1)
