"""Residual: a method applied to a weight after subtracting a product of two frozen factors.

PiSSA, MiLoRA, OLoRA, CorDA and LoRA-GA start from non-zero factors and change the base so that the output does not
change. Here the base is not changed: the product that they subtract from it is stored in the adapter.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, cast

from lorac.argument_types import Count
from lorac.variants._composite import CompositeVariant
from lorac.variants.base import Dropout, InitContext, Params, ParamSpec, Role, Site, Tensor, Variant, WeightVariant
from lorac.variants.initialisers import zeros


@dataclass(frozen=True, kw_only=True)
class Residual(CompositeVariant):
    """``W' = f(W − B₀·A₀)``, where f is a method with its tensors, and A₀ and B₀ are frozen.

    Attributes:
        method: f; the residual's ``targets`` apply, not the method's.
        r: rank of B₀·A₀.
        rank_pattern: module pattern -> r of these modules.
    """

    method: WeightVariant
    r: Count = 8
    rank_pattern: Mapping[str, int] = field(default_factory=dict)

    name = "residual"
    dropout_place = Dropout.INPUT
    patterned: ClassVar[Mapping[str, str]] = {"rank_pattern": "r"}

    @classmethod
    def around(cls, method: WeightVariant, r: int, rank_pattern: Mapping[str, int]) -> "Residual":
        """Wrap a method in a residual, with the method's targets and the modules and biases that it trains whole."""
        common = {name: value for name, value in method.settings.items() if name not in method.own_settings}
        return cls(method=method, r=r, rank_pattern=rank_pattern, **common)  # type: ignore[arg-type]  # of the same fields

    @property
    def trained_method(self) -> Variant:
        return self.method

    @property
    def dropout(self) -> float:
        """The method's dropout rate; dropout acts on the whole change, so that a fresh adapter changes nothing."""
        return float(getattr(self.method, "dropout", 0.0))

    def at_path(self, path: str) -> Variant:
        residual = cast(Residual, super().at_path(path))
        return dataclasses.replace(residual, method=cast(WeightVariant, self.method.at_path(path)))

    def adapts(self, site: Site) -> bool:
        return self.method.adapts(site)

    @property
    def inner(self) -> dict[str, WeightVariant]:
        return {"": self.method}

    def inner_sites(self, site: Site) -> dict[str, Site]:
        return {"": site}

    def inner_weight(self, prefix: str, context: InitContext) -> Tensor:
        return context.weight()

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {
            **super().params(site),
            "start_A": ParamSpec((self.r, site.in_features), zeros, role=Role.FROZEN),
            "start_B": ParamSpec((site.out_features, self.r), zeros, role=Role.FROZEN),
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        return self.method.weight(W - p.start_B @ p.start_A, p)

    def compute_bias(self, W: Tensor, b: Tensor, p: Params) -> Tensor:
        return self.method.compute_bias(W - p.start_B @ p.start_A, b, p)
