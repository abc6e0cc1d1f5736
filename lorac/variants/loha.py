"""LoHa: the Hadamard product of two low-rank matrices.

FedPara: Hyeon-Woo et al. 2021, arXiv 2108.06098; LyCORIS: Yeh et al. 2023, arXiv 2309.14859; shapes and initialisation
as in PEFT's LOHA.
"""

from dataclasses import dataclass

from lorac.variants._conv_kernels import expand_groups, kernel_columns, multiply_factors, uniform_core
from lorac.variants.base import Params, ParamSpec, Site, Tensor, WeightVariant
from lorac.variants.initialisers import kaiming_uniform, zeros
from lorac.variants.low_rank import ScaledRank


@dataclass(frozen=True, kw_only=True)
class LoHa(ScaledRank, WeightVariant):
    """``W' = W + (alpha/r)·(A₁·B₁)∘(A₂·B₂)``, a change of rank up to r².

    Attributes:
        r: rank of each product.
        effective_conv2d: PEFT's use_effective_conv2d: kernels of more than one tap are factored along all their axes,
            by cores ``hada_t1`` and ``hada_t2`` (r, r, taps).
    """

    effective_conv2d: bool = False

    name = "loha"
    paper = "FedPara: Low-Rank Hadamard Product, arXiv 2108.06098; LyCORIS, arXiv 2309.14859"

    def params(self, site: Site) -> dict[str, ParamSpec]:
        out, r = site.out_features, self.r
        channels, taps = kernel_columns(site)
        if self.effective_conv2d and taps > 1:
            a, b = (r, out), (r, channels)
            cores = {name: ParamSpec((r, r, taps), uniform_core) for name in ("hada_t1", "hada_t2")}
        else:
            a, b, cores = (out, r), (r, channels * taps), {}
        return {
            "hada_w1_a": ParamSpec(a, kaiming_uniform),
            "hada_w1_b": ParamSpec(b, kaiming_uniform),
            "hada_w2_a": ParamSpec(a, kaiming_uniform),
            "hada_w2_b": ParamSpec(b, zeros),
            **cores,
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        return W + expand_groups(self.scale * (_product(p, 1) * _product(p, 2)), W)


def _product(p: Params, number: int) -> Tensor:
    """Return operand ``number`` of the Hadamard product, (out, in/groups·taps)."""
    a, b = getattr(p, f"hada_w{number}_a"), getattr(p, f"hada_w{number}_b")
    return multiply_factors(a, b, getattr(p, f"hada_t{number}", None))
