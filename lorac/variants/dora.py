"""DoRA: weight-decomposed low-rank adaptation.

Liu et al. 2024, arXiv 2402.09353; the norm is per output feature, as in the paper's code and PEFT.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from lorac.argument_types import Count
from lorac.variants.base import Params, ParamSpec, Site, Tensor, WeightVariant
from lorac.variants.initialisers import row_norms
from lorac.variants.low_rank import RankStabilizedFields, peft_factor_specs, rescale_rows


@dataclass(frozen=True, kw_only=True)
class DoRA(RankStabilizedFields, WeightVariant):
    """``W' = (m/n) ∘ (W + s·B·A)`` with n the row norms (out,) of W + s·B·A, constant in the backward pass.

    Attributes:
        peft_groups: use PEFT's norm at a convolution of that many groups: the norm of the stored kernel (out,
            in/groups·taps) plus s·B'·A reshaped to it, where B' (out/groups, r) is the stored B (out, r/groups)
            reshaped. None: use n.
        peft_groups_pattern: module pattern -> peft_groups of these modules.
    """

    peft_groups: Count | None = None
    peft_groups_pattern: Mapping[str, int] = field(default_factory=dict)

    name = "dora"
    paper = "DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353"
    patterned: ClassVar[Mapping[str, str]] = {
        **RankStabilizedFields.patterned,
        "peft_groups_pattern": "peft_groups",
    }

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return peft_factor_specs(site, self.r) | {"magnitude": ParamSpec((site.out_features,), row_norms)}

    def weight(self, W: Tensor, p: Params) -> Tensor:
        updated, groups = W + self.scale * (p.lora_B @ p.lora_A), self.peft_groups or 1
        if groups == 1:
            return rescale_rows(updated, p.magnitude)
        # All blocks of a row except one are zeros.
        kernel, stored = (matrix.unflatten(1, (groups, -1)).sum(1) for matrix in (W, p.lora_B))
        shuffled = (stored.reshape(-1, p.lora_A.shape[0]) @ p.lora_A).reshape(kernel.shape)
        return rescale_rows(updated, p.magnitude, kernel + self.scale * shuffled)
