"""Full fine-tuning of chosen weights as an adapter: a whole trained weight replaces the base's.

Optimizers for whole weights (``lorac.training.GaLoreAdamW``) train this method.
"""

from dataclasses import dataclass

from lorac.variants.base import Params, ParamSpec, Site, Tensor, WeightVariant


@dataclass(frozen=True, kw_only=True)
class Full(WeightVariant):
    """``W' = weight`` (out, in), which starts as W; kernels are flattened. ``bias="all"`` trains the biases too.

    The base does not change, so that the adapter is swapped and mixed like any other; it takes as much memory as W.
    """

    name = "full"
    paper = "full fine-tuning"

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {"weight": ParamSpec((site.out_features, site.in_features), lambda context: context.weight().clone())}

    def weight(self, W: Tensor, p: Params) -> Tensor:
        return p.weight
