"""Methods that multiply the entries of a weight: by vectors, or by a low-rank matrix.

(IA)³: Liu et al. 2022, arXiv 2205.05638; the scaled side of a layer as in PEFT.
HiRA: Huang et al., ICLR 2025, OpenReview TwJrTz9cRS (not on arXiv); names and initialisation as in PEFT's HIRA.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from lorac.argument_types import Count
from lorac.ir.sites.patterns import match_pattern
from lorac.variants.base import MATRIX_KINDS, Params, ParamSpec, Site, SiteKind, Tensor, WeightVariant
from lorac.variants.initialisers import ones
from lorac.variants.low_rank import InputDropout, peft_factor_specs

_ALL = ".*"


@dataclass(frozen=True, kw_only=True)
class IA3(WeightVariant):
    """``W' = l∘W`` and ``b' = l∘b`` with l a column (out, 1); in feedforward modules ``W' = W∘l``, l a row (1, in).

    A convolution's input scale is per channel, (1, channels).

    Attributes:
        feedforward: PEFT's feedforward_modules, the modules whose input is scaled: endings of paths, or one regular
            expression for the whole path.
        scales_bias: whether a scale of outputs also scales the bias; LyCORIS's does not.
    """

    feedforward: str | Sequence[str] = ()
    scales_bias: bool = True

    name = "ia3"
    paper = "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, arXiv 2205.05638"
    kinds = MATRIX_KINDS - {SiteKind.EMBEDDING}

    def scales_input(self, path: str) -> bool:
        """Return whether the module at ``path`` is a feedforward module; PEFT compares suffixes of the path's text."""
        if isinstance(self.feedforward, str):
            return match_pattern(self.feedforward, path) is not None
        return path.endswith(tuple(self.feedforward))

    def at_path(self, path: str) -> "IA3":
        """Return this variant for one site, with a ``feedforward`` that matches every path or no path."""
        return dataclasses.replace(self, feedforward=_ALL if self.scales_input(path) else ())

    def params(self, site: Site) -> dict[str, ParamSpec]:
        channels = site.in_features if site.conv is None else site.conv.channels
        shape = (1, channels) if self.scales_input(site.path) else (site.out_features, 1)
        return {"ia3_l": ParamSpec(shape, ones)}

    def weight(self, W: Tensor, p: Params) -> Tensor:
        scale = p.ia3_l
        if self.feedforward and scale.shape[1] < W.shape[1]:
            scale = scale.repeat_interleave(W.shape[1] // scale.shape[1], dim=1)
        return W * scale

    def new_bias(self, b: Tensor, p: Params) -> Tensor:
        return b if self.feedforward or not self.scales_bias else b * p.ia3_l[:, 0]


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
