"""GLoRA: low-rank changes of the weight and of the layer's input.

Chavan et al. 2023, arXiv 2306.07967, in the form of LyCORIS (https://github.com/KohakuBlueleaf/LyCORIS,
lycoris/modules/glora.py), with its names and start values; the paper also has changes of the bias.
"""

from dataclasses import dataclass

import torch

from lorac.variants._conv_kernels import kernel_columns, require_one_group
from lorac.variants.base import MATRIX_KINDS, Params, ParamSpec, Site, SiteKind, Tensor, WeightVariant
from lorac.variants.initialisers import kaiming_uniform, zeros
from lorac.variants.low_rank import ScaledRank


@dataclass(frozen=True, kw_only=True)
class GLoRA(ScaledRank, WeightVariant):
    """``W' = W + s·(W·a1·a2 + b1·b2)`` with s = alpha/r, a1 (in, r), a2 (r, in), b1 (out, r), b2 (r, in).

    At a convolution a1 (channels, r) and a2 (r, channels) mix the input's channels, in the same way at all taps.
    """

    name = "glora"
    paper = (
        "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning, arXiv 2306.07967; LyCORIS, arXiv 2309.14859"
    )
    kinds = MATRIX_KINDS - {SiteKind.EMBEDDING}

    def check(self, site: Site) -> None:
        super().check(site)
        require_one_group(self.name, site)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        channels, taps = kernel_columns(site)
        return {
            "a1": ParamSpec((channels, self.r), kaiming_uniform),
            "a2": ParamSpec((self.r, channels), zeros),
            "b1": ParamSpec((site.out_features, self.r), kaiming_uniform),
            "b2": ParamSpec((self.r, channels * taps), zeros),
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        taps = W.shape[1] // p.a1.shape[0]
        a1, a2 = p.a1, p.a2
        if taps > 1:
            eye = torch.eye(taps, dtype=a1.dtype, device=a1.device)
            a1, a2 = torch.kron(a1, eye), torch.kron(a2, eye)
        return W + self.scale * ((W @ a1) @ a2 + p.b1 @ p.b2)
