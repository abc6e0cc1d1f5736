"""AdaLoRA by hand."""

import math

import pytest
import torch
from torch import nn

import lorac
from lorac import AdaLoRA, Site, SiteKind
from lorac.ir.algebra.changes import LowRank
from lorac.testing import HOSTS, Case, assert_close
from tests import parity
from tests.limits import assert_deviation
from tests.refusing import refuses


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@torch.no_grad()
def test_worked_example():
    """alpha/(r + 1e-5) = 3: 3·B·diag(2, −1)·A."""
    host = nn.Sequential()
    host.add_module("site", nn.Linear(2, 2, bias=False, dtype=torch.float64))
    host.site.weight.data = tensor([[1.0, 0.0], [0.0, 1.0]])
    tensors = {
        "lora_A": tensor([[1.0, 0.0], [1.0, 1.0]]),
        "lora_E": tensor([[2.0], [-1.0]]),
        "lora_B": tensor([[1.0, 0.0], [1.0, 2.0]]),
    }
    adapter = lorac.Adapter("a", AdaLoRA(r=2, alpha=6.00003, targets=("site",)), {"site": tensors})
    for mode in ("live", "fused", "baked"):
        answer = lorac.compile(host, {"a": adapter}, mode=mode)(torch.eye(2, dtype=torch.float64)).t()
        assert_close(answer, tensor([[7.0, 0.0], [0.0, -5.0]]))


def test_reduces_to_a_single_low_rank_pair():
    value = Case(AdaLoRA(r=3), HOSTS["linear"]).live.pool["a"].changes["site"]
    assert isinstance(value, LowRank)
    assert value.rank == 3
    assert not value.scales


@torch.no_grad()
def test_a_pruned_adapter_equals_a_masked_one():
    """The scale stays that of the rank it started with."""
    case = Case(AdaLoRA(r=3, alpha=5), HOSTS["linear"])
    p = case.a.tensors["site"]
    masked = {**p, "lora_E": p["lora_E"] * tensor([[1.0], [0.0], [1.0]])}
    left = torch.tensor([True, False, True])
    pruned = {"lora_A": p["lora_A"][left], "lora_E": p["lora_E"][left], "lora_B": p["lora_B"][:, left]}
    variant = AdaLoRA(r=3, alpha=5, targets=("site",), rank_pattern={"site": [True, False, True]})
    reference = lorac.compile(case.model, {"b": lorac.Adapter("b", case.a.variant, {"site": masked})})(case.x)
    compiled = lorac.compile(case.model, {"b": lorac.Adapter("b", variant, {"site": pruned})})
    assert compiled.pool["b"].changes["site"].rank == 2
    parity.assert_parity(compiled(case.x), reference, case.base(case.x))
    with refuses("shape_mismatch"):
        lorac.compile(case.model, {"b": lorac.Adapter("b", variant, {"site": p})})


@pytest.mark.parametrize("mode", ["live", "fused"])
@torch.no_grad()
def test_a_site_that_kept_nothing_is_the_base(mode):
    case = Case(AdaLoRA(r=3), HOSTS["linear"])
    variant = AdaLoRA(r=3, targets=("site",), rank_pattern={"site": (False, False, False)})
    compiled = lorac.compile(case.model, {"b": variant}, mode=mode)
    assert {name: tuple(t.shape) for name, t in compiled.adapters["b"].tensors["site"].items()} == {
        "lora_A": (0, 7),
        "lora_E": (0, 1),
        "lora_B": (11, 0),
    }
    assert_close(compiled(case.x), case.base(case.x))


def test_count():
    """Rank 2 at the six matrices of DeBERTaV3-base's 12 layers: one value a component more than LoRA's 0.33 M."""
    sites = [Site("s", SiteKind.LINEAR, 768, 768, torch.float32, "s.weight")] * 4
    sites += [Site("s", SiteKind.LINEAR, *shape, torch.float32, "s.weight") for shape in ((3072, 768), (768, 3072))]
    found = 12 * sum(math.prod(spec.shape) for site in sites for spec in AdaLoRA(r=2).params(site).values())
    assert found == 12 * 2 * (4 * (2 * 768 + 1) + 2 * (3072 + 768 + 1))
    assert round(found / 1e6, 2) == 0.33


def test_initial_values():
    host = nn.Sequential()
    host.add_module("site", nn.Linear(400, 300))
    tensors = lorac.compile(host, {"a": AdaLoRA(targets=("site",))}).adapters["a"].tensors["site"]
    assert not tensors["lora_E"].any()
    for name in ("lora_A", "lora_B"):
        assert_deviation(tensors[name], 0.02)
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {
        "lora_A": (12, 400),
        "lora_E": (12, 1),
        "lora_B": (300, 12),
    }
    assert list(lorac.sites(host)) == ["site"]
