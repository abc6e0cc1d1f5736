"""RoAd: rotations and scales of pairs of outputs.

Liao and Monz 2024, arXiv 2409.00119; pairs, parameters and start values as in PEFT's ROAD.
"""

from dataclasses import dataclass
from typing import Annotated

import torch

from lorac.argument_types import Count, OneOf
from lorac.errors import OptionError
from lorac.variants._layer_shapes import require_divisor
from lorac.variants.base import Params, ParamSpec, Site, SiteKind, Tensor, WeightVariant
from lorac.variants.initialisers import ones, zeros

_ANGLES = {"road_1": (1, 1), "road_2": (1, 2), "road_4": (2, 2)}
"""Form -> (sets for cosine and sine, halves of a group that have separate angles)."""


@dataclass(frozen=True, kw_only=True)
class RoAd(WeightVariant):
    """``W' = R·W`` and ``b' = R·b``: R rotates outputs i and i + group_size/2 of a group by θ, and scales them by α.

    With y₁ and y₂ the halves of a group: ``y₁' = α·cos θ∘y₁ − α·sin θ∘y₂``, ``y₂' = α·sin θ∘y₁ + α·cos θ∘y₂``.

    Attributes:
        variant: PEFT's name for the number of angles and scales. ``"road_1"``: one of each per pair; ``"road_2"``: one
            of each per output; ``"road_4"``: two of each per output, for the cosine and for the sine.
        group_size: size of the groups within which outputs are paired; even, and a divisor of out.
    """

    variant: Annotated[str, OneOf(tuple(_ANGLES))] = "road_1"
    group_size: Count = 64

    name = "road"
    paper = (
        "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability, arXiv 2409.00119"
    )
    kinds = frozenset({SiteKind.LINEAR})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size % 2:
            raise OptionError(f"RoAd cannot halve group_size={self.group_size}", next_step="give an even group_size")

    def check(self, site: Site) -> None:
        super().check(site)
        require_divisor(site, "group_size", self.group_size, outputs=True)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        sets, halves = _ANGLES[self.variant]
        shape = (site.out_features // 2 * sets * halves,)
        return {"road_theta": ParamSpec(shape, zeros, decay=False), "road_alpha": ParamSpec(shape, ones, decay=False)}

    def weight(self, W: Tensor, p: Params) -> Tensor:
        return self._turn(W, p)

    def new_bias(self, b: Tensor, p: Params) -> Tensor:
        return self._turn(b, p)

    def _turn(self, rows: Tensor, p: Params) -> Tensor:
        """Return R times rows (out, …)."""
        shape = (-1, *_ANGLES[self.variant], self.group_size // 2)
        theta, alpha = p.road_theta.reshape(shape), p.road_alpha.reshape(shape)
        cosine, sine = (alpha * theta.cos())[:, 0, ..., None], (alpha * theta.sin())[:, -1, ..., None]
        pairs = rows.reshape(cosine.shape[0], 2, shape[-1], -1)
        turned = torch.stack((-pairs[:, 1], pairs[:, 0]), 1)
        return (cosine * pairs + sine * turned).reshape(rows.shape)
