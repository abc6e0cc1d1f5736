"""Models in half precision with adapters of three kinds, and their references."""

from __future__ import annotations

from typing import Any

import torch

import lorac
from lorac.testing import contribution
from lorac.testing.samples import AIM
from tests.zoo import ZOO

NAMES = ("tiny_bert", "tiny_llama", "tiny_vit")


def adapters(name: str) -> dict[str, lorac.Adapter]:
    """Return a LoRA, a DoRA and a router over a model, away from their init."""
    first, *_, last = ZOO[name].targets
    methods = {
        "lora": lorac.LoRA(r=3, alpha=6, targets=[first, last]),
        "dora": lorac.DoRA(r=2, alpha=4, targets=[first]),
        "router": lorac.MeteoRA(r=2, targets=[last]),
    }
    compiled = lorac.compile(ZOO[name].fresh(), methods, active=None)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for a in compiled.adapters.values() for p in a.parameters() if p.is_floating_point()):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return dict(compiled.adapters)


class Reference:
    """The same weights and adapters in float32, with weights that half precision has rounded already.

    Args:
        name: of the zoo.
        dtype: the half precision.
    """

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.entry, self.dtype, self.adapters = ZOO[name], dtype, adapters(name)
        wide = self.entry.fresh(dtype).float()
        self.eager: Any = lorac.compile(wide, self.adapters, active=None)
        self.base = self._of(None)
        shares = {adapter: self._share(adapter) for adapter in self.adapters}
        self.choices = {adapter: {adapter: AIM / share} for adapter, share in shares.items()}

    def _share(self, adapter: str) -> float:
        return max(contribution(self._of(adapter), self.base, self.entry.outputs).values())

    def _of(self, choice: Any) -> Any:
        with torch.no_grad():
            return self.eager(**self.inputs(torch.float32), adapters=choice)

    def of(self, adapter: str) -> Any:
        """Return the model's outputs with an adapter, at the strength of the test."""
        return self._of(self.choices[adapter])

    def inputs(self, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """Return inputs that half precision has rounded already."""
        given = self.entry.inputs(dtype=self.dtype)
        return {n: v.to(dtype) if dtype and v.is_floating_point() else v for n, v in given.items()}
