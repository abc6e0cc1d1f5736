"""DoRA, weight-decomposed low-rank adaptation, and Magnitude, its trained norms alone.

Liu et al. 2024, arXiv 2402.09353; the norm is per output feature, as in the paper's code and PEFT.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from lorac.argument_types import Count
from lorac.variants._layer_shapes import kernel_columns, require_one_group
from lorac.variants.base import MATRIX_KINDS, Params, ParamSpec, Site, SiteKind, Tensor, WeightVariant
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
    patterned: ClassVar[Mapping[str, str]] = {**RankStabilizedFields.patterned, "peft_groups_pattern": "peft_groups"}

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


@dataclass(frozen=True, kw_only=True)
class Magnitude(WeightVariant):
    """``W' = (m/n)∘W`` with n the norms of the rows (out,), constant in the backward pass.

    Magnitude: trained norms of the rows or columns of a weight, the part of DoRA that works with any method. LyCORIS:
    ``weight_decompose`` of all its algorithms (https://github.com/KohakuBlueleaf/LyCORIS); Liu et al. 2024, arXiv
    2402.09353, with column norms.

    In a ``Chain`` after another method, W is that method's W'.

    Attributes:
        columns: whether n are the norms of the columns (in,), at a convolution of the input channels.
    """

    columns: bool = False

    name = "magnitude"
    paper = "DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353; LyCORIS, arXiv 2309.14859"
    kinds = MATRIX_KINDS - {SiteKind.EMBEDDING}

    def check(self, site: Site) -> None:
        super().check(site)
        if self.columns:
            require_one_group("magnitude with columns=True", site)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        if not self.columns:
            return {"magnitude": ParamSpec((site.out_features,), row_norms)}
        channels = kernel_columns(site)[0]
        return {
            "magnitude": ParamSpec(
                (channels,), lambda context: torch.linalg.vector_norm(_channel_rows(context.weight(), channels), dim=1)
            )
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        if not self.columns:
            return rescale_rows(W, p.magnitude)
        channels = _channel_rows(W, p.magnitude.shape[0])
        return rescale_rows(channels, p.magnitude).unflatten(1, (W.shape[0], -1)).transpose(0, 1).flatten(1)


def _channel_rows(W: Tensor, channels: int) -> Tensor:
    """Return W (out, channels·taps) as a matrix with one row (out·taps) per channel."""
    return W.unflatten(1, (channels, -1)).transpose(0, 1).flatten(1)
