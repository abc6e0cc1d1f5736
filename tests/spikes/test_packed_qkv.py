"""Spike: q, k and v packed in one linear layer, with adapters that target different rows of it."""

from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import lorac
from lorac import ParamSpec
from lorac.variants import initialisers
from tests.parity import assert_parity
from tests.variants.away import away

pytestmark = pytest.mark.medium("variants/test_split.py: queries and values of a packed layer")

IN, D = 5, 4


@dataclass(frozen=True, kw_only=True)
class PackedLoRA(lorac.WeightVariant):
    """LoRA on some of the equal parts of a packed projection; the rows of the others stay."""

    parts: tuple[int, ...] = (0,)
    of: int = 3
    r: int = 2
    name, paper = "spike-packed", "arXiv 2106.09685"

    def params(self, site):
        found = {}
        for part in self.parts:
            found[f"lora_A{part}"] = ParamSpec((self.r, site.in_features), initialisers.kaiming_uniform)
            found[f"up{part}"] = ParamSpec((site.out_features // self.of, self.r), initialisers.zeros)
        return found

    def weight(self, W, p):
        rows = W.shape[0] // self.of
        for part in self.parts:
            padded = F.pad(getattr(p, f"up{part}"), (0, 0, part * rows, (self.of - 1 - part) * rows))
            W = W + padded @ getattr(p, f"lora_A{part}")
        return W


@pytest.mark.parametrize(("target", "mode"), [("eager", "auto"), ("eager", "fused"), ("onnxruntime", "auto")])
@torch.no_grad()
def test_adapters_of_different_rows_are_swapped_and_mixed(target, mode):
    host, x = torch.nn.Sequential(OrderedDict(qkv=torch.nn.Linear(IN, 3 * D))).eval(), torch.randn(3, 7, IN)
    given = {"qv": PackedLoRA(parts=(0, 2), r=3), "k": PackedLoRA(parts=(1,), r=1)}
    given = {name: away(variant, host, (x,), name) for name, variant in given.items()}
    compiled = lorac.compile(host, given, target=target, mode=mode, example_inputs=(x,))
    assert mode == "fused" or compiled.plans["qkv"].rank == 2 * 3 + 1  # found low-rank: swapped live
    base, own = host(x), compiled(x, adapters=None)
    for choice in ({"qv": 1.0}, {"k": 1.0}, {"qv": 0.7, "k": 0.3}):
        y = base.clone()
        for name, strength in choice.items():
            for part in given[name].variant.parts:
                a, b = (given[name].tensors["qkv"][f"{key}{part}"] for key in ("lora_A", "up"))
                y[..., part * D : (part + 1) * D] += strength * (x @ a.T @ b.T)
        compiled.swap(choice)
        assert_parity(compiled(x), y, base, own_base=own)
