"""Hyper-parameters, tensors and formulas that LoRA-like methods share."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from lorac.argument_types import Count
from lorac.variants.base import Dropout, ParamSpec, Role, Site, SiteKind, Tensor, Variant
from lorac.variants.initialisers import kaiming_uniform, normal, zeros


@dataclass(frozen=True, kw_only=True)
class InputDropout(Variant):
    """A method with dropout on the input of its change.

    Attributes:
        dropout: rate of the dropout on the change's input, in training.
    """

    dropout: float = 0.0

    dropout_place: ClassVar[Dropout] = Dropout.INPUT


@dataclass(frozen=True, kw_only=True)
class ScaledRank(Variant):
    """A method with a rank, and a scale that depends on it.

    Attributes:
        r: rank.
        alpha: the scale is alpha/r.
        rank_pattern: module pattern -> r of these modules.
        alpha_pattern: module pattern -> alpha of these modules.
    """

    r: Count = 8
    alpha: float = 8
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    patterned: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "alpha"}

    @property
    def scale(self) -> float:
        """The factor of the change, alpha/r."""
        return self.alpha / self.r


@dataclass(frozen=True, kw_only=True)
class LowRankFields(InputDropout, ScaledRank):
    """The hyper-parameters of LoRA-like methods."""


@dataclass(frozen=True, kw_only=True)
class RankStabilizedFields(LowRankFields):
    """The hyper-parameters of LoRA-like methods that offer rsLoRA's scale.

    Attributes:
        rslora: PEFT's use_rslora: whether the scale is alpha/√r.
    """

    rslora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


def factor_specs(site: Site, rank: int, role: Role = Role.TRAINABLE) -> dict[str, ParamSpec]:
    """Return the specs of ``lora_A`` (rank, in) and ``lora_B`` (out, rank); B starts at zero."""
    return {
        "lora_A": ParamSpec((rank, site.in_features), kaiming_uniform, role),
        "lora_B": ParamSpec((site.out_features, rank), zeros, role),
    }


def peft_factor_specs(site: Site, rank: int, prefix: str = "lora") -> dict[str, ParamSpec]:
    """Return the specs of A (rank, in) and B (out, rank) with PEFT's start values.

    B starts at zero. At an embedding A starts at zero and B is drawn from N(0, 1), so that training moves the looked-up
    rows first.
    """
    embedding = site.kind is SiteKind.EMBEDDING
    return {
        f"{prefix}_A": ParamSpec((rank, site.in_features), zeros if embedding else kaiming_uniform),
        f"{prefix}_B": ParamSpec((site.out_features, rank), normal(1.0) if embedding else zeros),
    }


def rescale_rows(updated: Tensor, magnitude: Tensor, measured: Tensor | None = None) -> Tensor:
    """Return ``(m/n) ∘ W'`` (out, in), where n are the row norms (out,) of W', constant in the backward pass.

    Args:
        measured: a matrix whose row norms are used instead.
    """
    norm = torch.linalg.vector_norm(updated if measured is None else measured, dim=1).detach()
    return (magnitude / norm)[:, None] * updated
