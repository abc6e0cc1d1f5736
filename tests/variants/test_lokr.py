"""LoKr by hand, and against PEFT's division into factors."""

import pytest
import torch
from peft.tuners.lokr.layer import factorization
from torch import nn

import lorac
from lorac import LoKr, Site, SiteKind
from lorac.testing import assert_close
from lorac.variants.lokr import factors
from tests.refusing import refuses


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def hosting(layer):
    host = nn.Sequential()
    host.add_module("site", layer.double())
    return host


def shapes(variant, layer):
    site = lorac.sites(hosting(layer))["site"]
    return {name: spec.shape for name, spec in variant.at(site).params(site).items()}


@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 4, 5, 8, 12, 16, 50, 5000])
def test_division_is_peft_s(factor):
    numbers = (*range(1, 130), 768, 1024, 3072, 4096, 11008)
    assert [factors(n, factor) for n in numbers] == [factorization(n, factor) for n in numbers]


def test_division():
    assert [factors(n, -1) for n in (256, 128, 127)] == [(16, 16), (8, 16), (1, 127)]
    assert factors(128, 4) == (4, 32)
    assert factors(12, 5) == (3, 4)


@torch.no_grad()
def test_worked_example():
    """w1 = [[1, 2]], w2 = [[1], [3]] and alpha = r: ΔW = [[1, 2], [3, 6]]."""
    host = hosting(nn.Linear(2, 2, bias=False))
    host.site.weight.zero_()
    variant = LoKr(r=1, alpha=1, targets=("site",))
    # 2 is divided as (1, 2), so that w1 is (1, 1) there; the formula takes any.
    p = lorac.ir.algebra.reduction.Params(lokr_w1=tensor([[1.0, 2.0]]), lokr_w2=tensor([[1.0], [3.0]]))
    assert variant.weight(host.site.weight, p).tolist() == [[1.0, 2.0], [3.0, 6.0]]
    tensors = {"lokr_w1": tensor([[3.0]]), "lokr_w2": tensor([[1.0, 2.0], [0.0, 1.0]])}
    for mode in ("live", "fused", "baked"):
        compiled = lorac.compile(host, {"a": lorac.Adapter("a", variant, {"site": tensors})}, mode=mode)
        assert compiled(torch.eye(2, dtype=torch.float64)).tolist() == [[3.0, 0.0], [6.0, 3.0]]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"r": 2}, {"lokr_w1": (4, 3), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 5)}),
        ({"r": 3}, {"lokr_w1": (4, 3), "lokr_w2": (6, 5)}),
        (
            {"r": 1, "decompose_both": True},
            {"lokr_w1_a": (4, 1), "lokr_w1_b": (1, 3), "lokr_w2_a": (6, 1), "lokr_w2_b": (1, 5)},
        ),
        ({"r": 2, "decompose_both": True}, {"lokr_w1": (4, 3), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 5)}),
        ({"r": 4, "rank_pattern": {"site": 3}}, {"lokr_w1": (4, 3), "lokr_w2": (6, 5)}),
        ({"r": 1, "decompose_factor": 2}, {"lokr_w1": (2, 1), "lokr_w2_a": (12, 1), "lokr_w2_b": (1, 15)}),
        (
            {"r": 4, "decompose_factor": 15, "decompose_both": True},
            {"lokr_w1_a": (4, 4), "lokr_w1_b": (4, 15), "lokr_w2": (6, 1)},
        ),
    ],
)
def test_factors_have_the_documented_shapes(settings, expected):
    """Of a layer 15 -> 24, divided into (3, 5) and (4, 6) if not told otherwise."""
    assert shapes(LoKr(**settings), nn.Linear(15, 24)) == expected


@pytest.mark.medium("one of each decomposition", keep=["1-settings0-*", "2-settings1-*"])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"r": 8}, {"lokr_w1": (2, 2), "lokr_w2": (5, 3 * 6)}),
        ({"r": 1}, {"lokr_w1": (2, 2), "lokr_w2_a": (5, 1), "lokr_w2_b": (1, 3 * 6)}),
        (
            {"r": 2, "effective_conv2d": True},
            {"lokr_w1": (2, 2), "lokr_t2": (2, 2, 6), "lokr_w2_a": (2, 5), "lokr_w2_b": (2, 3)},
        ),
    ],
)
@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_convolutions(settings, expected, groups):
    """kernel[i·k + p, j·n + q] = w1[i, j]·w2[p, q] of a group's 6 channels, so that groups merge."""
    layer = nn.Conv2d(6 * groups, 10, (3, 2), groups=groups)
    host, variant = hosting(layer), LoKr(targets=("site",), alpha=3, **settings)
    assert shapes(variant, layer) == expected
    compiled = lorac.compile(host, {"a": variant})
    p = compiled.adapters["a"].tensors["site"]
    for value in p.values():
        value.normal_()
    w2 = p.get("lokr_w2")
    if w2 is None and "lokr_t2" in p:
        w2 = torch.einsum("ijt,ip,jq->pqt", p["lokr_t2"], p["lokr_w2_a"], p["lokr_w2_b"])
    elif w2 is None:
        w2 = p["lokr_w2_a"] @ p["lokr_w2_b"]
    kernel = torch.kron(p["lokr_w1"][:, :, None, None], w2.reshape(5, 3, 3, 2).contiguous()) * 3 / variant.r
    baked = lorac.compile(host, {"a": compiled.adapters["a"]}, mode="baked")
    assert_close(baked.host.site.weight, host.site.weight + kernel)
    x = torch.randn(2, 6 * groups, 5, 5, dtype=torch.float64)
    assert_close(compiled(x), baked(x))


def test_rejects_factors_below_1():
    site = Site("site", SiteKind.LINEAR, 24, 15, torch.float32, "site.weight")
    for factor in (0, -2):
        with refuses("site_unsupported", match=f"decompose_factor={factor} divides"):
            LoKr(decompose_factor=factor).check(site)
