"""Hydra: a parallel and a sequential low-rank branch on one linear layer.

Kim et al. 2023, arXiv 2309.06922.
"""

from dataclasses import dataclass

import torch.nn.functional as F

from lorac.argument_types import Count
from lorac.variants.base import BranchVariant, Context, Dropout, Params, ParamSpec, Site, Tensor
from lorac.variants.initialisers import xavier_uniform, zeros


@dataclass(frozen=True, kw_only=True)
class Hydra(BranchVariant):
    """``y' = y + s·[U_p(D_p·x + c_p) + e_p + U_s(D_s·y + c_s) + e_s]``: affine, so that it can be merged.

    Attributes:
        r: rank of the parallel branch.
        r_sequential: rank of the sequential branch.
        scale: s.
        dropout: rate of the dropout between the factors, in training.
        branch_bias: whether the bottlenecks have biases c and e (the paper's vision models do, its language models do
            not).
    """

    r: Count = 2
    r_sequential: Count = 2
    scale: float = 1.0
    dropout: float = 0.0
    branch_bias: bool = False

    name = "hydra"
    paper = "Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning, arXiv 2309.06922"
    dropout_place = Dropout.RANK
    instead = "lorac.to_lora(adapter, model) makes a LoRA of it"

    def params(self, site: Site) -> dict[str, ParamSpec]:
        out = site.out_features
        specs = {
            "parallel_down": ParamSpec((self.r, site.in_features), xavier_uniform),
            "parallel_up": ParamSpec((out, self.r), zeros),
            "sequential_down": ParamSpec((self.r_sequential, out), xavier_uniform),
            "sequential_up": ParamSpec((out, self.r_sequential), zeros),
        }
        if self.branch_bias:
            specs |= {
                "parallel_down_bias": ParamSpec((self.r,), zeros),
                "parallel_up_bias": ParamSpec((out,), zeros),
                "sequential_down_bias": ParamSpec((self.r_sequential,), zeros),
                "sequential_up_bias": ParamSpec((out,), zeros),
            }
        return specs

    def branch(self, x: Tensor, y: Tensor, p: Params, ctx: Context) -> Tensor:
        def bottleneck(value: Tensor, name: str) -> Tensor:
            hidden = F.linear(value, getattr(p, f"{name}_down"), getattr(p, f"{name}_down_bias", None))
            return F.linear(hidden, getattr(p, f"{name}_up"), getattr(p, f"{name}_up_bias", None))

        return y + self.scale * (bottleneck(x, "parallel") + bottleneck(y, "sequential"))
