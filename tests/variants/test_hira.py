"""HiRA by hand."""

import math

import pytest
import torch
from torch import nn

import lorac
from lorac import HiRA
from lorac.ir.algebra.changes import Dense
from lorac.testing import assert_close
from tests import parity


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def adapter(name, a, b):
    return lorac.Adapter(name, HiRA(r=1, targets=("site",)), {"site": {"hira_A": a, "hira_B": b}})


@pytest.fixture
def model():
    host = nn.Sequential()
    host.add_module("site", nn.Linear(2, 2, bias=False, dtype=torch.float64))
    host.site.weight.data = tensor([[1.0, 2.0], [3.0, 4.0]])
    return host


@torch.no_grad()
def test_worked_example(model):
    """B·A = [[3, 0], [6, 0]]: W' = [[1·4, 2], [3·7, 4]]."""
    a = adapter("a", tensor([[3.0, 0.0]]), tensor([[1.0], [2.0]]))
    for mode in ("live", "fused", "baked"):
        assert lorac.compile(model, {"a": a}, mode=mode)(torch.eye(2, dtype=torch.float64)).tolist() == [
            [4.0, 21.0],
            [2.0, 4.0],
        ]


def test_needs_the_weight_itself(model):
    a = adapter("a", tensor([[3.0, 1.0]]), tensor([[1.0], [2.0]]))
    assert isinstance(lorac.compile(model, {"a": a}).pool["a"].changes["site"], Dense)


@torch.no_grad()
def test_several_act_on_the_original_weight(model):
    """W + Σ W∘(Bᵢ·Aᵢ), not one after the other."""
    one = adapter("a", tensor([[3.0, 0.0]]), tensor([[1.0], [2.0]]))
    two = adapter("b", tensor([[1.0, 1.0]]), tensor([[1.0], [0.0]]))
    x = torch.eye(2, dtype=torch.float64)
    for mode in ("live", "fused"):
        compiled = lorac.compile(model, {"a": one, "b": two}, mode=mode)
        assert compiled(x, adapters={"a": 1.0, "b": 1.0}).tolist() == [[5.0, 21.0], [4.0, 4.0]]


@torch.no_grad()
def test_restores_a_weight_that_was_multiplied_by_zero(model):
    """Unmerging divides by nothing: entries multiplied by 0 return, too."""
    model.site.weight.data[0, 0] = 0
    erases = adapter("a", tensor([[-1.0, -1.0]]), tensor([[1.0], [1.0]]))
    compiled = lorac.compile(model, {"a": erases}, mode="fused")
    columns_of_weight = torch.eye(2, dtype=torch.float64)
    assert compiled(columns_of_weight).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    compiled.swap(None)
    assert torch.equal(compiled(columns_of_weight), model(columns_of_weight))


@torch.no_grad()
def test_a_grouped_kernel_keeps_its_blocks():
    """What is 0 outside the blocks stays 0, so that it merges."""
    host = nn.Sequential()
    host.add_module("site", nn.Conv2d(4, 6, 3, groups=2, dtype=torch.float64))
    compiled = lorac.compile(host, {"a": HiRA(r=2, targets=("site",))})
    p = compiled.adapters["a"].tensors["site"]
    p["hira_B"].normal_()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    factor = 1 + (p["hira_B"] @ p["hira_A"]).reshape(6, 4, 3, 3)
    own = torch.cat([factor[:3, :2], factor[3:, 2:]])
    expected = nn.functional.conv2d(x, host.site.weight * own, host.site.bias, groups=2)
    fused = lorac.compile(host, {"a": compiled.adapters["a"]}, mode="fused")
    for answer in (compiled(x), fused(x)):
        assert_close(answer, expected)


@torch.no_grad()
def test_embedding_rows():
    host = nn.Sequential()
    host.add_module("site", nn.Embedding(5, 3, dtype=torch.float64))
    fresh = lorac.compile(host, {"a": HiRA(r=2, targets=("site",))}).adapters["a"]
    p = fresh.tensors["site"]
    assert not p["hira_A"].any() and p["hira_B"].any()
    p["hira_A"].normal_(0, 0.1)
    ids = torch.tensor([4, 0, 2])
    table = host.site.weight * (1 + (p["hira_B"] @ p["hira_A"]).t())
    parity.assert_parity(lorac.compile(host, {"a": fresh})(ids), table[ids], host(ids))


def test_count_and_patterns():
    sites = lorac.sites(nn.ModuleDict({"a": nn.Linear(7, 11), "b": nn.Conv2d(3, 8, 3), "c": nn.Embedding(13, 6)}))
    variant = HiRA(r=4, rank_pattern={"b": 2})
    numel = {p: sum(math.prod(s.shape) for s in variant.at(site).params(site).values()) for p, site in sites.items()}
    assert numel == {"a": 4 * (7 + 11), "b": 2 * (27 + 8), "c": 4 * (13 + 6)}
