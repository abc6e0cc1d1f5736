"""HiRA: a low-rank matrix that multiplies the weight entry by entry.

Huang et al., ICLR 2025, OpenReview TwJrTz9cRS (not on arXiv); names and initialisation as in PEFT's HIRA.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from lorac.argument_types import Count
from lorac.variants.base import Params, ParamSpec, Site, Tensor, WeightVariant
from lorac.variants.low_rank import InputDropout, peft_factor_specs


@dataclass(frozen=True, kw_only=True)
class HiRA(InputDropout, WeightVariant):
    """``W' = W∘(1 + B·A)``: proportional to W, and so of high rank. There is no scale.

    Attributes:
        r: rank of B·A.
        rank_pattern: module pattern -> r of these modules.
    """

    r: Count = 32
    rank_pattern: Mapping[str, int] = field(default_factory=dict)

    name = "hira"
    paper = "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation, OpenReview TwJrTz9cRS"
    patterned: ClassVar[Mapping[str, str]] = {"rank_pattern": "r"}

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return peft_factor_specs(site, self.r, "hira")

    def weight(self, W: Tensor, p: Params) -> Tensor:
        return W * (1 + p.hira_B @ p.hira_A)
