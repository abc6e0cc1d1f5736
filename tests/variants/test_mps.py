"""MPS adaptation by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lorac
from lorac import Site, SiteKind
from lorac.ir.algebra.changes import LowRank
from lorac.testing import HOSTS, Case
from lorac.variants.params import InitContext
from tests import parity
from tests.limits import assert_deviation
from tests.refusing import refuses


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def layer(out, columns):
    return Site("site", SiteKind.LINEAR, out, columns, torch.float32, "site.weight")


def counted(variant, site):
    return sum(math.prod(spec.shape) for spec in variant.params(site).values())


def first_factor(variant, p, columns):
    """A, read off the update of zeros with B = I."""
    whole = SimpleNamespace(**{**p, "lora_B": torch.eye(variant.r, dtype=torch.float64)})
    return variant.weight(torch.zeros(variant.r, columns, dtype=torch.float64), whole)


def test_worked_example():
    p = {"mps_g1": tensor([[[1.0, 0.0], [0.0, 1.0]]]), "mps_g2": tensor([[1.0, 2.0], [3.0, 4.0]])}
    assert first_factor(lorac.MPS(r=1, alpha=1, chi=2), p, 4).tolist() == [[1.0, 2.0, 3.0, 4.0]]


def test_the_rank_on_the_last_core():
    """G1 = I, G2[k, b, p]: A[p, a·2 + b] = G2[a, b, p]."""
    p = {"mps_g1": torch.eye(2, dtype=torch.float64), "mps_g2": torch.arange(12.0).double().reshape(2, 2, 3)}
    a = first_factor(lorac.MPS(r=3, alpha=3, chi=2, rank_leg="last"), p, 4)
    assert a.tolist() == [[0.0, 3.0, 6.0, 9.0], [1.0, 4.0, 7.0, 10.0], [2.0, 5.0, 8.0, 11.0]]


@pytest.mark.parametrize("rank_leg", ["first", "last"])
@torch.no_grad()
def test_contracted_is_materialised(rank_leg):
    case = Case(lorac.MPS(r=3, alpha=5, chi=2, rank_leg=rank_leg), HOSTS["divisible"])
    p, x = case.a.tensors["site"], case.x
    if rank_leg == "first":
        assert p["mps_g1"].shape == (3, 3, 2)
        halves = x.unflatten(-1, (3, 4))
        hidden = torch.einsum("...ab,kb,pak->...p", halves, p["mps_g2"], p["mps_g1"])
    else:
        assert p["mps_g2"].shape == (2, 3, 3)
        halves = x.unflatten(-1, (4, 3))
        hidden = torch.einsum("...ab,ak,kbp->...p", halves, p["mps_g1"], p["mps_g2"])
    expected = case.base(x) + 5 / 3 * hidden @ p["lora_B"].t()
    parity.assert_parity(case.live(x), expected, case.base(x))


@pytest.mark.parametrize("rank_leg", ["first", "last"])
def test_published_count(rank_leg):
    variant = lorac.MPS(r=256, chi=32, dims=(64, 64), rank_leg=rank_leg)
    assert counted(variant, layer(4096, 4096)) == 1_574_912
    assert counted(lorac.LoRA(r=256), layer(4096, 4096)) == 2_097_152
    assert lorac.MPS().split(layer(4096, 4096)) == (64, 64)


def test_the_smaller_half_carries_the_rank():
    assert lorac.MPS().split(layer(1, 768)) == (24, 32)
    assert lorac.MPS(rank_leg="last").split(layer(1, 768)) == (32, 24)
    assert lorac.MPS().split(layer(1, 13)) == (1, 13)


@torch.no_grad()
def test_ranks():
    """Of each row of A (d1, d2) at most chi, of the update r whatever chi is."""
    variant = lorac.MPS(r=3, alpha=5, chi=1)
    case = Case(variant, HOSTS["divisible"])
    a = first_factor(variant, case.a.tensors["site"], 12)
    assert [int(torch.linalg.matrix_rank(row.reshape(3, 4))) for row in a] == [1, 1, 1]
    value = case.live.pool["a"].changes["site"]
    assert isinstance(value, LowRank)
    assert value.rank == 3
    assert not value.scales
    assert torch.linalg.matrix_rank(value.a @ value.b) == 3


def test_a_wide_bond_reaches_every_factor():
    """chi = d2: G2 = I, G1 the rows of A."""
    wanted = torch.randn(3, 12, dtype=torch.float64)
    p = {"mps_g1": wanted.reshape(3, 3, 4), "mps_g2": torch.eye(4, dtype=torch.float64)}
    found = first_factor(lorac.MPS(r=3, alpha=3, chi=4), p, 12)
    assert torch.equal(found, wanted)


def test_cores_get_gradients_once_b_is_not_zero():
    model = HOSTS["divisible"].model()
    compiled = lorac.compile(model, {"a": lorac.MPS(r=2, chi=3, targets=("site",))})
    p, x = compiled.adapters["a"].tensors["site"], HOSTS["divisible"].inputs((5,))
    for moved in (False, True):
        if moved:
            p["lora_B"].data.normal_()
        compiled(x).square().sum().backward()
        assert bool(p["lora_B"].grad.any())
        assert bool(p["mps_g1"].grad.any()) == bool(p["mps_g2"].grad.any()) == moved


def test_start_has_the_variance_of_lora():
    """1/(3·in)."""
    variant, site = lorac.MPS(r=64, chi=16), layer(8, 1024)
    generator = torch.Generator().manual_seed(0)
    p = {
        name: spec.init(InitContext(spec.shape, site, lambda: None, SimpleNamespace(), generator, "a")).double()
        for name, spec in variant.params(site).items()
        if name.startswith("mps")
    }
    a = first_factor(lorac.MPS(r=64, alpha=64, chi=16), p, 1024)
    assert_deviation(a, (3 * 1024) ** -0.5)


def test_refusals():
    model = HOSTS["divisible"].model()
    with refuses("site_unsupported", match="into 3 x 5; 'site' has 12"):
        lorac.compile(model, {"a": lorac.MPS(dims=(3, 5), targets=("site",))})
    with refuses("site_unsupported", match="into 2 x 2 x 3"):
        lorac.compile(model, {"a": lorac.MPS(dims=(2, 2, 3), targets=("site",))})
    with pytest.raises(lorac.OptionError, match="'lats'"):
        lorac.MPS(rank_leg="lats")
    conv = nn.Sequential()
    conv.add_module("site", nn.Conv2d(3, 8, 3))
    with refuses("site_unsupported", match="conv2d"):
        lorac.compile(conv, {"a": lorac.MPS(targets=("site",))})


@torch.no_grad()
def test_the_split_is_saved(tmp_path):
    """It is part of what the adapter is: the same cores in another order are another A."""
    case = Case(lorac.MPS(r=2, chi=2, dims=(2, 6), rank_leg="last"), HOSTS["divisible"])
    lorac.save_adapter(case.a, tmp_path / "a.safetensors", format="native")
    loaded = lorac.load_adapter(tmp_path / "a.safetensors", case.model)
    assert loaded.variant == case.a.variant
    assert torch.equal(lorac.compile(case.model, {"a": loaded})(case.x), case.live(case.x))
