"""DyLoRA by hand: one adapter at every rank."""

import math

import pytest
import torch
from torch import nn

import lorac
from lorac.ir.algebra.changes import LowRank
from lorac.testing import HOSTS, Case, assert_close
from tests import parity

RANKS = (1, 2, 3)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def at_rank(b, strength=1.0):
    return {"a": lorac.Active(strength, rank=b)}


@pytest.fixture
def case():
    return Case(lorac.DyLoRA(r=3, alpha=5), HOSTS["linear"])


def as_lora(case, b):
    """The plain LoRA of rank b that shipping the first b components makes: alpha is kept."""
    p = case.a.tensors["site"]
    tensors = {"lora_A": p["lora_A"][:b].contiguous(), "lora_B": p["lora_B"][:, :b].contiguous()}
    return lorac.Adapter("a", lorac.LoRA(r=b, alpha=5, targets=("site",)), {"site": tensors})


@pytest.mark.parametrize("mode", ["live", "fused"])
@torch.no_grad()
def test_worked_example(mode):
    model = nn.Sequential()
    # A weight of 2 x 2 has no room for rank 2, so the other two are padding.
    model.add_module("site", nn.Linear(4, 4, bias=False, dtype=torch.float64))
    model.site.weight.data.zero_()
    a, b = torch.eye(2, 4, dtype=torch.float64), tensor([[1, 2], [3, 4], [0, 0], [0, 0]])
    adapter = lorac.Adapter("a", lorac.DyLoRA(r=2, alpha=2, targets=("site",)), {"site": {"lora_A": a, "lora_B": b}})
    compiled = lorac.compile(model, {"a": adapter}, mode=mode)
    x = tensor([[1, 1, 0, 0]])
    for rank, expected in ((1, [2, 6]), (2, [3, 7])):
        compiled.swap(at_rank(rank))
        assert compiled(x)[0, :2].tolist() == expected
    compiled.swap("a")
    assert compiled(x)[0, :2].tolist() == [3, 7]


@pytest.mark.medium("one rank", keep=["2"])
@pytest.mark.parametrize("b", RANKS)
def test_cut_is_the_lora_that_ships_at_that_rank(case, b):
    """With gradients recorded and without, live and fused, swapped and for one call."""
    expected, base = lorac.compile(case.model, {"a": as_lora(case, b)})(case.x), case.base(case.x)
    parity.assert_parity(case.live(case.x, adapters=at_rank(b)), expected, base)
    with torch.no_grad():
        parity.assert_parity(case.live(case.x, adapters=at_rank(b)), expected, base)
        for mode in ("live", "fused"):
            compiled = case.compiled(case.a, mode=mode, active=at_rank(b))
            parity.assert_parity(compiled(case.x), expected, base)


@pytest.mark.medium("one rank", keep=["2"])
@pytest.mark.parametrize("b", RANKS)
@torch.no_grad()
def test_an_adapter_cut_to_a_rank_matches_that_rank(case, b, tmp_path):
    """The file holds b·(in + out) values."""
    lorac.save_adapter(as_lora(case, b), tmp_path / "cut", model=case.model)
    shipped = lorac.load_adapter(tmp_path / "cut", case.model)
    assert shipped.numel() == b * (7 + 11)
    expected = case.live(case.x, adapters=at_rank(b))
    parity.assert_parity(lorac.compile(case.model, {"a": shipped})(case.x), expected, case.base(case.x))


@pytest.mark.slow
@torch.no_grad()
def test_cut_in_onnxruntime(case):
    x = case.x.float()
    compiled = lorac.compile(case.model32, {"a": case.a}, target="onnxruntime", mode="live", example_inputs=(x,))
    compiled.swap(at_rank(2))
    expected = lorac.compile(case.model32, {"a": as_lora(case, 2)})(x)
    parity.assert_parity(compiled(x), expected, case.model32(x))


@torch.no_grad()
def test_strength_and_mixtures_of_cut_adapters(case):
    base = case.base(case.x)
    moved = [lorac.compile(case.model, {"a": as_lora(case, b)})(case.x) - base for b in (2, 3)]
    answer = case.live(case.x, adapters=at_rank(2, 0.5))
    parity.assert_parity(answer, base + 0.5 * moved[0], base)
    twice = lorac.Adapter("b", case.a.variant, case.a.tensors)
    compiled = case.compiled(case.a, twice)
    answer = compiled(case.x, adapters={**at_rank(2, 0.7), "b": 0.3})
    parity.assert_parity(answer, base + 0.7 * moved[0] + 0.3 * moved[1], base)


def test_a_rank_above_the_largest_uses_all(case):
    assert torch.equal(case.live(case.x, adapters=at_rank(9)), case.live(case.x))


def test_scale_is_alpha_over_the_rank_used():
    """R = 4, alpha = 8: 4 at rank 2; a single root of R/b would give 2.83."""
    model = nn.Sequential()
    model.add_module("site", nn.Linear(9, 9, bias=False, dtype=torch.float64))
    ones = {"lora_A": torch.ones(4, 9, dtype=torch.float64), "lora_B": torch.ones(9, 4, dtype=torch.float64)}
    adapter = lorac.Adapter("a", lorac.DyLoRA(r=4, alpha=8, targets=("site",)), {"site": ones})
    compiled = lorac.compile(model, {"a": adapter}, mode="baked", active=at_rank(2))
    moved = compiled.host.site.weight - model.site.weight
    assert_close(moved, torch.full_like(moved, 4 * 2))


def test_trains_as_lora_at_full_rank(case):
    gradients = []
    for adapter in (case.a, as_lora(case, 3)):
        compiled = lorac.compile(case.model, {"a": adapter}).train()
        compiled(case.x).square().sum().backward()
        gradients.append([p.grad for p in compiled.parameters() if p.requires_grad])
    for own, lora in zip(*gradients, strict=True):
        assert_close(own, lora)


def test_identity_at_init_at_every_rank(case):
    fresh = lorac.compile(case.model, {"a": case.variant})
    for b in RANKS:
        assert torch.equal(fresh(case.x, adapters=at_rank(b)), case.base(case.x))


def test_reduces_to_low_rank(case):
    value = case.live.pool["a"].changes["site"]
    assert isinstance(value, LowRank)
    assert value.rank == 3


@pytest.mark.medium("live", cases=["fused"])
@pytest.mark.parametrize("mode", ["live", "fused"])
@torch.no_grad()
def test_factors_larger_than_the_weight_are_cut_too(mode):
    """7 -> 11: rank 5 needs 90 numbers where the weight has 77, and is a pair of factors all the same."""
    case = Case(lorac.DyLoRA(r=5, alpha=5), HOSTS["linear"])
    compiled = case.compiled(case.a, mode=mode)
    for b in (2, 4, 5):
        expected = lorac.compile(case.model, {"a": as_lora(case, b)})(case.x)
        compiled.swap(at_rank(b))
        parity.assert_parity(compiled(case.x), expected, case.base(case.x))


def test_layers_of_other_ranks_are_cut_each():
    model = nn.Sequential()
    model.add_module("first", nn.Linear(8, 9, dtype=torch.float64))
    model.add_module("second", nn.Linear(9, 7, dtype=torch.float64))
    variant = lorac.DyLoRA(r=3, alpha=6, rank_pattern={"second": 2}, targets=("first", "second"))
    compiled = lorac.compile(model, {"a": variant}, mode="fused", active=None)
    tensors = compiled.adapters["a"].tensors
    with torch.no_grad():
        for at in tensors.values():
            at["lora_B"].normal_()
    again = lorac.compile(model, {"a": compiled.adapters["a"]}, mode="baked", active=at_rank(2))
    for path, at in tensors.items():
        expected = model.get_submodule(path).weight + 6 / 2 * at["lora_B"][:, :2] @ at["lora_A"][:2]
        assert_close(again.host.get_submodule(path).weight, expected)


def test_count():
    site = lorac.sites(HOSTS["linear"].model())["site"]
    numel = sum(math.prod(spec.shape) for spec in lorac.DyLoRA(r=4).params(site).values())
    assert numel == 4 * (7 + 11)
