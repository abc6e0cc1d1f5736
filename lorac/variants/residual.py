"""Residual: a method on what is left of a weight when a product of two factors is taken out of it.

PiSSA, MiLoRA, OLoRA, CorDA and LoRA-GA begin with factors that are not zero, and rewrite the base so that it answers as
before. Here the base stays as it is: what they take out of it is two frozen factors of the adapter's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch

from lorac.ir.algebra.reduction import Params
from lorac.ir.sites import Site
from lorac.ir.slots.live_terms import Dropout
from lorac.variants import _initialisers as _inits
from lorac.variants.base import Variant, WeightVariant
from lorac.variants.params import ParamSpec, Role

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Residual(WeightVariant):
    """``W' = f(W − B₀·A₀)``, f a method with tensors of its own, A₀ and B₀ frozen.

    Attributes:
        method: f. What it targets is not asked: the residual's own ``targets`` count.
        r: rank of B₀·A₀.
        rank_pattern: module pattern -> its own r.
    """

    method: WeightVariant
    r: int = 8
    rank_pattern: Mapping[str, int] = field(default_factory=dict)

    name: ClassVar[str] = "residual"
    dropout_place: ClassVar[Dropout] = Dropout.INPUT
    patterned: ClassVar[Mapping[str, str]] = {"rank_pattern": "r"}

    @classmethod
    def around(cls, method: WeightVariant, r: int, rank_pattern: Mapping[str, int]) -> Residual:
        """A residual that targets what a method targets, and trains beside it what that does."""
        common = {name: value for name, value in method.settings.items() if name not in method.own_settings}
        return cls(method=method, r=r, rank_pattern=rank_pattern, **common)

    @property
    def trained(self) -> Variant:
        return self.method

    @property
    def dropout(self) -> float:
        """The method's own rate; it acts on the whole change, so that at the start it does nothing."""
        return float(getattr(self.method, "dropout", 0.0))

    def at_path(self, path: str) -> Variant:
        here = cast(Residual, super().at_path(path))
        return dataclasses.replace(here, method=cast(WeightVariant, self.method.at_path(path)))

    def adapts(self, site: Site) -> bool:
        return self.method.adapts(site)

    def starts_as_base(self, site: Site) -> bool:
        return self.method.starts_as_base(site)

    def check(self, site: Site) -> None:
        super().check(site)
        self.method.check(site)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {
            **self.method.params(site),
            "start_A": ParamSpec((self.r, site.in_features), _inits.zeros, role=Role.FROZEN),
            "start_B": ParamSpec((site.out_features, self.r), _inits.zeros, role=Role.FROZEN),
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        return self.method.weight(W - p.start_B @ p.start_A, p)

    def new_bias(self, b: Tensor, p: Params) -> Tensor:
        return self.method.new_bias(b, p)
