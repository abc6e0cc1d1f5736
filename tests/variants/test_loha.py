"""LoHa by hand."""

import math

import pytest
import torch
from torch import nn

import lorac
from lorac import LoHa, Site, SiteKind
from lorac.testing import HOSTS, Case, assert_close
from tests.refusing import refuses


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def hosting(layer):
    host = nn.Sequential()
    host.add_module("site", layer.double())
    return host


def filled(host, variant, seed=0):
    """The tensors of a fresh adapter, drawn anew, and the compiled model."""
    compiled = lorac.compile(host, {"a": variant})
    generator = torch.Generator().manual_seed(seed)
    tensors = compiled.adapters["a"].tensors["site"]
    with torch.no_grad():
        for value in tensors.values():
            value.normal_(generator=generator)
    return tensors, compiled


@torch.no_grad()
def test_worked_example():
    """(A₁·B₁)∘(A₂·B₂) = [[1, 2], [3, 6]]∘[[1, 1], [0, 0]], times alpha/r = 2."""
    host = hosting(nn.Linear(2, 2, bias=False))
    host.site.weight.zero_()
    tensors = {
        "hada_w1_a": tensor([[1.0], [3.0]]),
        "hada_w1_b": tensor([[1.0, 2.0]]),
        "hada_w2_a": tensor([[1.0], [0.0]]),
        "hada_w2_b": tensor([[1.0, 1.0]]),
    }
    adapter = lorac.Adapter("a", LoHa(r=1, alpha=2, targets=("site",)), {"site": tensors})
    for mode in ("live", "fused", "baked"):
        compiled = lorac.compile(host, {"a": adapter}, mode=mode)
        assert compiled(torch.eye(2, dtype=torch.float64)).tolist() == [[2.0, 0.0], [4.0, 0.0]]


@torch.no_grad()
def test_rank_is_up_to_r_squared():
    case = Case(LoHa(r=3), HOSTS["divisible"])
    p = case.a.tensors["site"]
    change = case.variant.weight(torch.zeros(6, 12, dtype=torch.float64), lorac.ir.algebra.reduction.Params(**p))
    assert torch.linalg.matrix_rank(change) == 6
    case = Case(LoHa(r=2), HOSTS["divisible"])
    p = case.a.tensors["site"]
    change = case.variant.weight(torch.zeros(6, 12, dtype=torch.float64), lorac.ir.algebra.reduction.Params(**p))
    assert torch.linalg.matrix_rank(change) == 4


@pytest.mark.medium("one layer with Tucker factors and one without", keep=["False-layer0", "True-layer1"])
@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, (3, 2), groups=2), nn.Conv2d(3, 5, 3), nn.Conv1d(4, 6, 3)])
@pytest.mark.parametrize("effective", [False, True])
@torch.no_grad()
def test_convolutions(layer, effective):
    """The kernel's own shape (out, in/groups, …), so that groups merge."""
    host = hosting(layer)
    p, compiled = filled(host, LoHa(r=2, alpha=3, effective_conv2d=effective, targets=("site",)))
    if effective:
        factors = [torch.einsum("ijt,ip,jq->pqt", p[f"hada_t{i}"], p[f"hada_w{i}_a"], p[f"hada_w{i}_b"]) for i in "12"]
    else:
        factors = [p[f"hada_w{i}_a"] @ p[f"hada_w{i}_b"] for i in "12"]
    kernel = 1.5 * (factors[0] * factors[1]).reshape(host.site.weight.shape)
    baked = lorac.compile(host, {"a": compiled.adapters["a"]}, mode="baked")
    assert_close(baked.host.site.weight, host.site.weight + kernel)
    x = torch.randn(2, layer.in_channels, *(5,) * len(layer.kernel_size), dtype=torch.float64)
    assert_close(compiled(x), baked(x))


def test_a_single_tap_needs_no_core():
    host = hosting(nn.Conv2d(3, 5, 1))
    specs = LoHa(r=2, effective_conv2d=True).params(lorac.sites(host)["site"])
    assert {name: spec.shape for name, spec in specs.items()} == {
        "hada_w1_a": (5, 2),
        "hada_w1_b": (2, 3),
        "hada_w2_a": (5, 2),
        "hada_w2_b": (2, 3),
    }


def test_published_count():
    """FedPara's table 1: 2R(I + J), for a 256 x 256 layer with R = 16 16 384 (16 K)."""
    site = Site("site", SiteKind.LINEAR, 256, 256, torch.float32, "site.weight")
    assert sum(math.prod(spec.shape) for spec in LoHa(r=16).params(site).values()) == 16_384


def test_rejects_another_rank():
    host = hosting(nn.Linear(3, 4))
    p, _ = filled(host, LoHa(r=2, targets=("site",)))
    with refuses("shape_mismatch"):
        lorac.compile(host, {"a": lorac.Adapter("a", LoHa(r=1, targets=("site",)), {"site": p})})
