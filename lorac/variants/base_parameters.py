"""Methods that train parameters of the base itself: whole weights, normalisation layers, biases.

Optimizers for whole weights (``lorac.training.GaLoreAdamW``) train ``Full``. LNTuning: Zhao et al. 2023, arXiv
2312.11420. BEFT: Bias-Efficient Fine-Tuning, 2025, arXiv 2509.15974; layout as in PEFT.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lorac.ir.sites.patterns import is_named
from lorac.variants.base import Params, ParamSpec, Site, SiteKind, Tensor, Variant, WeightVariant
from lorac.variants.initialisers import zeros


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


@dataclass(frozen=True, kw_only=True)
class LNTuning(Variant):
    """The adapter's parameters of the targeted modules replace the base's; there is no formula.

    Attributes:
        targets: any modules; the default matches the usual names of normalisation layers.
    """

    targets: str | Sequence[str] = r"(.*\.)?(\w*[nN]orm\w*|ln_\w+)"

    name = "ln_tuning"
    paper = "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning, arXiv 2312.11420"
    kinds = frozenset(SiteKind) - {SiteKind.ONCE}

    def replaces_module(self, path: str) -> bool:
        return is_named(self.targets, path) and not (self.exclude and is_named(self.exclude, path))

    def adapts(self, site: Site) -> bool:
        return False  # a targeted linear layer is replaced whole too

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {}


@dataclass(frozen=True, kw_only=True)
class BEFT(WeightVariant):
    """``W' = W`` and ``b' = b + β``, with β (1, out). The paper targets only value projections."""

    name = "beft"
    paper = "BEFT: Bias-Efficient Fine-Tuning of Language Models in Low-Data Regimes, arXiv 2509.15974"
    kinds = frozenset({SiteKind.LINEAR})

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {"beft_bias": ParamSpec((1, site.out_features), zeros, decay=False)}

    def weight(self, W: Tensor, p: Params) -> Tensor:
        return W

    def new_bias(self, b: Tensor, p: Params) -> Tensor:
        return b + p.beft_bias[0]
