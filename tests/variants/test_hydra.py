"""Hydra by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lorac
from lorac import Site, SiteKind
from lorac.ir.algebra.changes import LowRank
from lorac.testing import HOSTS, Case, assert_close
from tests import parity
from tests.limits import rank_of


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture
def worked():
    model = nn.Sequential()
    model.add_module("site", nn.Linear(2, 2, dtype=torch.float64))
    model.site.weight.data, model.site.bias.data = tensor([[1.0, 2.0], [3.0, 4.0]]), tensor([0.5, -0.5])
    tensors = {
        "parallel_down": tensor([[1.0, -1.0]]),
        "parallel_up": tensor([[2.0], [0.0]]),
        "sequential_down": tensor([[0.0, 1.0]]),
        "sequential_up": tensor([[1.0], [1.0]]),
    }
    variant = lorac.Hydra(r=1, r_sequential=1, scale=0.5, targets=("site",))
    return model, lorac.Adapter("a", variant, {"site": tensors})


@torch.no_grad()
def test_worked_example(worked):
    model, adapter = worked
    x = tensor([[1.0, 1.0]])
    assert model(x).tolist() == [[3.5, 6.5]]
    for mode in ("live", "fused", "baked"):
        compiled = lorac.compile(model, {"a": adapter}, mode=mode)
        assert compiled(x).tolist() == [[6.75, 9.75]]
    assert compiled.host.site.weight.tolist() == [[3.5, 3.0], [4.5, 6.0]]
    assert compiled.host.site.bias.tolist() == [0.25, -0.75]


def test_reduces_to_a_single_low_rank_pair(worked):
    model, adapter = worked
    value = lorac.compile(model, {"a": adapter}).pool["a"].changes["site"]
    assert isinstance(value, LowRank)
    assert value.rank == 2
    assert not value.scales


@pytest.mark.medium("each switch once", keep=["0.3-False", "100.0-True"])
@pytest.mark.parametrize("branch_bias", [False, True])
@pytest.mark.parametrize("scale", [-3.0, 0.3, 100.0])
@torch.no_grad()
def test_a_fresh_adapter_equals_the_base(scale, branch_bias):
    case = Case(lorac.Hydra(r=3, r_sequential=2, scale=scale, branch_bias=branch_bias), HOSTS["linear"])
    compiled = lorac.compile(case.model, {"a": case.variant})
    assert_close(compiled(case.x), case.base(case.x))


@torch.no_grad()
def test_the_pair_is_the_merged_change_and_of_both_ranks():
    case = Case(lorac.Hydra(r=2, r_sequential=3, scale=0.7), HOSTS["linear"])
    value = case.live.pool["a"].changes["site"]
    baked = lorac.compile(case.model, {"a": case.a}, mode="baked").host.site.weight
    moved = baked - case.weight
    assert_close((value.a @ value.b).t(), moved)
    assert rank_of(moved) == 2 + 3


@torch.no_grad()
def test_equals_lora_without_the_sequential_branch():
    case = Case(lorac.Hydra(r=3, r_sequential=2, scale=0.7), HOSTS["linear"])
    p = case.a.tensors["site"]
    p["sequential_up"].zero_()
    lora = lorac.Adapter(
        "b",
        lorac.LoRA(r=3, alpha=0.7 * 3, targets=("site",)),
        {"site": {"lora_A": p["parallel_down"], "lora_B": p["parallel_up"]}},
    )
    parity.assert_parity(case.live(case.x), lorac.compile(case.model, {"b": lora})(case.x), case.base(case.x))


@torch.no_grad()
def test_multiplies_the_output_without_the_parallel_branch():
    case = Case(lorac.Hydra(r=3, r_sequential=2, scale=0.7), HOSTS["linear"])
    p = case.a.tensors["site"]
    p["parallel_up"].zero_()
    z = case.base(case.x)
    expected = z @ (torch.eye(11, dtype=torch.float64) + 0.7 * p["sequential_down"].t() @ p["sequential_up"].t())
    parity.assert_parity(case.live(case.x), expected, z)


@pytest.mark.parametrize(("branch_bias", "sites", "total"), [(False, "roberta", 331_776), (True, "vit", 239_712)])
def test_published_counts(branch_bias, sites, total):
    """RoBERTa-base, output.dense with ranks 4 and 8; ViT-B/16, attn.proj and mlp.fc2 with ranks 2 and biases."""
    shapes = {"roberta": [(768, 3072)], "vit": [(768, 768), (768, 3072)]}[sites]
    r, r_sequential = {"roberta": (4, 8), "vit": (2, 2)}[sites]
    variant = lorac.Hydra(r=r, r_sequential=r_sequential, branch_bias=branch_bias)
    found = 0
    for out, columns in shapes:
        site = Site("site", SiteKind.LINEAR, out, columns, torch.float32, "site.weight")
        found += 12 * sum(math.prod(spec.shape) for spec in variant.params(site).values())
    assert found == total


class Authors(nn.Module):
    """The layer as the authors' code computes it in training: each bottleneck is dropped whole, between its halves."""

    def __init__(self, layer, p, scale, rate):
        super().__init__()
        self.layer, self.p, self.scale, self.rate = layer, p, scale, rate

    def bottleneck(self, value, name):
        halves = [(self.p[f"{name}_{half}"], self.p.get(f"{name}_{half}_bias")) for half in ("down", "up")]
        down, up = halves
        return F.linear(F.dropout(F.linear(value, *down), self.rate), *up)

    def forward(self, x):
        z = self.layer(x)
        return z + self.scale * (self.bottleneck(x, "parallel") + self.bottleneck(z, "sequential"))


def _stepped(forward, x, tensors):
    """An answer, and the gradients of its square."""
    torch.manual_seed(3)
    y = forward(x)
    return y, torch.autograd.grad(y.square().sum(), tensors)


@pytest.mark.medium("with each switch on", keep=["linear-wide-True-1.0"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("branch_bias", [False, True])
@pytest.mark.parametrize("ranks", [(3, 2), (6, 6)], ids=["narrow", "wide"])
@pytest.mark.parametrize("host", ["linear", "no_bias", "transposed"])
def test_dropout_is_the_authors(host, ranks, branch_bias, strength):
    """With the same random numbers, the biases between the factors dropped too, for tokens in any number of axes.

    Both ranks together may be more than the layer has inputs, where the change itself is one dense matrix.
    """
    variant = lorac.Hydra(r=ranks[0], r_sequential=ranks[1], scale=0.7, dropout=0.4, branch_bias=branch_bias)
    case = Case(variant, HOSTS[host])
    compiled = lorac.compile(case.model, {"a": case.a})
    compiled.swap({"a": strength})
    compiled.train()
    p = dict(compiled.adapters["a"].tensors["site"])
    authors = Authors(case.model, p, 0.7, 0.4)
    for batch in case.host.batches:
        x = case.inputs(batch)
        base = case.base(x)
        (y, found), (expected, wanted) = (_stepped(forward, x, list(p.values())) for forward in (compiled, authors))
        assert_close(y - base, strength * (expected - base))
        if strength == 1:
            for one, other in zip(found, wanted, strict=True):
                assert_close(one, other)
    compiled.eval()
    assert_close(compiled(case.x), case.base(case.x) + strength * (case.live(case.x) - case.base(case.x)))


def test_dropping_all_leaves_the_upper_biases():
    """A rate of 1 leaves of a bottleneck its last bias alone; the affine form would leave U·c too."""
    case = Case(lorac.Hydra(r=3, r_sequential=2, scale=0.7, dropout=1.0, branch_bias=True), HOSTS["linear"])
    compiled = lorac.compile(case.model, {"a": case.a}).train()
    p = case.a.tensors["site"]
    assert_close(compiled(case.x), case.base(case.x) + 0.7 * (p["parallel_up_bias"] + p["sequential_up_bias"]))


def test_a_trained_bias_of_the_base_is_not_dropped():
    case = Case(lorac.Hydra(r=3, r_sequential=2, dropout=1.0, bias="all"), HOSTS["linear"])
    adapter = lorac.Adapter("a", case.variant, case.a.tensors, replaced={"site.bias": case.bias + 1})
    compiled = lorac.compile(case.model, {"a": adapter}).train()
    assert_close(compiled(case.x), case.base(case.x) + 1)


def test_applies_dropout_in_the_factors_dtype():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).to(torch.bfloat16)
    compiled = lorac.compile(net, {"a": lorac.Hydra(r=2, dropout=0.5)}).train()
    y = compiled(torch.randn(3, 6, dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(tensor.grad is not None for tensor in compiled.adapters["a"].parameters())
