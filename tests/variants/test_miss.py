"""MiSS and its mini form by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lorac
from lorac import Site, SiteKind
from lorac.ir.algebra.changes import LowRank
from lorac.testing import HOSTS, Case, assert_close
from tests import parity
from tests.refusing import refuses


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def change(block, columns, **fields):
    """W' − W of a weight of 2 outputs and ``columns`` inputs."""
    block = tensor(block)
    variant = lorac.MiSS(r=len(block), **fields)
    W = torch.randn(2, columns, dtype=torch.float64)
    return variant.weight(W, SimpleNamespace(miss_block=block)) - W


@pytest.mark.parametrize("mode", ["live", "fused", "baked"])
@torch.no_grad()
def test_worked_example(mode):
    model = nn.Sequential()
    model.add_module("site", nn.Linear(4, 2, dtype=torch.float64))
    adapter = lorac.Adapter(
        "a", lorac.MiSS(r=2, targets=("site",)), {"site": {"miss_block": tensor([[1.0, 2.0], [3.0, 4.0]])}}
    )
    x = torch.ones(1, 4, dtype=torch.float64)
    moved = lorac.compile(model, {"a": adapter}, mode=mode)(x) - model(x)
    assert_close(moved, tensor([[8.0, 12.0]]))


def test_every_shard_of_inputs_meets_the_same_block():
    assert_close(change([[1, 2], [3, 4]], 4), tensor([[1, 3, 1, 3], [2, 4, 2, 4]]))


def test_a_remainder_meets_the_first_rows():
    assert_close(change([[1, 2], [3, 4]], 5)[:, 4], tensor([1, 2]))


def test_mini_repeats_its_columns():
    assert_close(change([[1], [3]], 4, mini=True, mini_r=1), tensor([[1, 3, 1, 3], [1, 3, 1, 3]]))


def test_mini_of_all_outputs_is_the_plain_form():
    block = [[1, 2], [3, 4]]
    assert_close(change(block, 5, mini=True, mini_r=2), change(block, 5))


@torch.no_grad()
def test_is_a_lora_with_a_fixed_down_projection():
    case = Case(lorac.MiSS(r=3), HOSTS["linear"])  # 7 inputs: a remainder of 1
    folded = torch.cat([torch.eye(3, dtype=torch.float64)] * 3, dim=1)[:, :7]
    tensors = {"lora_A": folded, "lora_B": case.a.tensors["site"]["miss_block"].t().contiguous()}
    lora = lorac.Adapter("b", lorac.LoRA(r=3, alpha=3, targets=("site",)), {"site": tensors})
    parity.assert_parity(case.live(case.x), lorac.compile(case.model, {"b": lora})(case.x), case.base(case.x))


@pytest.mark.parametrize("mini", [False, True])
def test_reduces_to_low_rank(mini):
    case = Case(lorac.MiSS(r=3, mini=mini, mini_r=2), HOSTS["divisible"])
    value = case.live.pool["a"].changes["site"]
    assert isinstance(value, LowRank)
    assert value.rank == 3
    assert not value.scales
    assert value.e is None


@pytest.mark.parametrize(("fields", "reason"), [({"r": 8}, "r=7"), ({"r": 2, "mini": True, "mini_r": 2}, "mini_r=1")])
def test_rejects_unsupported_shapes(fields, reason):
    with refuses("site_unsupported") as error:
        lorac.compile(HOSTS["linear"].model(), {"a": lorac.MiSS(targets=("site",), **fields)})
    assert error.value.nearest == reason


def count(variant):
    """Trained values on q_proj and v_proj of the 28 layers of Llama-3.2-3B."""
    shapes = [(3072, 3072), (1024, 3072)]
    sites = [Site("site", SiteKind.LINEAR, out, columns, torch.float32, "site.weight") for out, columns in shapes]
    for site in sites:
        variant.check(site)
    return 28 * sum(math.prod(spec.shape) for site in sites for spec in variant.params(site).values())


def test_published_counts():
    assert count(lorac.MiSS(r=64)) == 7_340_032
    assert count(lorac.BAT(r=64)) == 7_340_032
    assert count(lorac.MiSS(r=64, mini=True, mini_r=64)) == 229_376
