"""Hydra: a parallel and a sequential low-rank branch on one linear layer.

Kim et al. 2023, arXiv 2309.06922.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from lorac.ir.algebra.reduction import Params
from lorac.ir.sites import Site
from lorac.ir.slots.live_terms import Dropout
from lorac.variants import _initialisers as _inits
from lorac.variants.base import BranchVariant, Context
from lorac.variants.params import ParamSpec


@dataclass(frozen=True, kw_only=True)
class Hydra(BranchVariant):
    """``y' = y + s·[U_p(D_p·x + c_p) + e_p + U_s(D_s·y + c_s) + e_s]``: affine, so it merges.

    Attributes:
        r: rank of the parallel branch.
        r_sequential: rank of the sequential branch.
        scale: s.
        dropout: rate of the dropout between the factors, in training.
        branch_bias: the bottlenecks carry biases c and e (the paper's vision models; not its language models).
    """

    r: int = 2
    r_sequential: int = 2
    scale: float = 1.0
    dropout: float = 0.0
    branch_bias: bool = False

    name: ClassVar[str] = "hydra"
    paper: ClassVar[str] = "Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning, arXiv 2309.06922"
    dropout_place: ClassVar[Dropout] = Dropout.RANK

    def params(self, site: Site) -> dict[str, ParamSpec]:
        out = site.out_features
        specs = {
            "parallel_down": ParamSpec((self.r, site.in_features), _inits.xavier_uniform),
            "parallel_up": ParamSpec((out, self.r), _inits.zeros),
            "sequential_down": ParamSpec((self.r_sequential, out), _inits.xavier_uniform),
            "sequential_up": ParamSpec((out, self.r_sequential), _inits.zeros),
        }
        if self.branch_bias:
            specs |= {
                "parallel_down_bias": ParamSpec((self.r,), _inits.zeros),
                "parallel_up_bias": ParamSpec((out,), _inits.zeros),
                "sequential_down_bias": ParamSpec((self.r_sequential,), _inits.zeros),
                "sequential_up_bias": ParamSpec((out,), _inits.zeros),
            }
        return specs

    def branch(self, x: torch.Tensor, y: torch.Tensor, p: Params, ctx: Context) -> torch.Tensor:
        def bottleneck(value: torch.Tensor, name: str) -> torch.Tensor:
            biases = (getattr(p, f"{name}_{half}_bias") if self.branch_bias else None for half in ("down", "up"))
            down_bias, up_bias = biases
            hidden = F.linear(value, getattr(p, f"{name}_down"), down_bias)
            return F.linear(hidden, getattr(p, f"{name}_up"), up_bias)

        return y + self.scale * (bottleneck(x, "parallel") + bottleneck(y, "sequential"))
