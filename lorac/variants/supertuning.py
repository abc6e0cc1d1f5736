"""Super-Tuning: trains the weight's largest entries; the hybrid Supra adds a LoRA.

arXiv 2607.09287; positions, scale and start values as in PEFT.
"""

from dataclasses import dataclass
from typing import Annotated

import torch

from lorac.argument_types import Bounds
from lorac.errors import OptionError, SiteError
from lorac.variants.base import Params, ParamSpec, Role, Site, Tensor, WeightVariant
from lorac.variants.initialisers import zeros
from lorac.variants.low_rank import factor_specs


@dataclass(frozen=True, kw_only=True)
class SuperTuning(WeightVariant):
    """``W' = W + S + (alpha/r)·B·A``, where S has K trained values at the positions of the K largest |W|.

    Attributes:
        sparsity: K = ⌊(1 − sparsity)·out·in⌋.
        select_top: False: the smallest |W| instead.
        r: rank of Supra's LoRA; None: there is none.
        alpha: PEFT's lora_alpha; None: 2r.
    """

    sparsity: Annotated[float, Bounds(0, 1)] = 0.99
    select_top: bool = True
    r: Annotated[int | None, Bounds(1)] = None
    alpha: float | None = None

    name = "supertuning"
    paper = "Super-Tuning, arXiv 2607.09287"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None and self.r is None:
            raise OptionError(
                f"alpha={self.alpha} scales a LoRA, and r is None", next_step="give r=, or leave alpha= out"
            )

    def check(self, site: Site) -> None:
        super().check(site)
        if not self.entries(site):
            raise SiteError(
                f"sparsity={self.sparsity} trains none of the entries of '{site.path}'", next_step="give a smaller one"
            )

    def entries(self, site: Site) -> int:
        """Return the number K of trained values at ``site``."""
        return int(site.out_features * site.in_features * (1 - self.sparsity))

    def positions(self, weight: Tensor) -> Tensor:
        """Return the positions (2, K) in W: rows and columns, in PEFT's order."""
        count = int(weight.numel() * (1 - self.sparsity))
        flat = torch.topk(weight.abs().flatten(), count, largest=self.select_top).indices
        return torch.stack((flat // weight.shape[1], flat % weight.shape[1]))

    def params(self, site: Site) -> dict[str, ParamSpec]:
        count, shape = self.entries(site), (site.out_features, site.in_features)
        specs = {
            "indices": ParamSpec((2, count), lambda c: self.positions(c.weight()), Role.INDEX, below=shape),
            "values": ParamSpec((count,), zeros, decay=False),
        }
        return specs if self.r is None else specs | factor_specs(site, self.r)

    def weight(self, W: Tensor, p: Params) -> Tensor:
        changed = torch.index_put(W, (p.indices[0], p.indices[1]), p.values, accumulate=True)
        if self.r is None:
            return changed
        return changed + (2.0 if self.alpha is None else self.alpha / self.r) * (p.lora_B @ p.lora_A)
