"""FourierFT by hand, and its positions against PEFT's."""

import math
from types import SimpleNamespace

import pytest
import torch
from peft import FourierFTConfig, get_peft_model
from torch import nn

import lorac
from lorac import FourierFT, Site, SiteKind
from lorac.ir.algebra.changes import Dense
from lorac.testing import assert_close
from tests.refusing import refuses


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def hosting(layer):
    host = nn.Sequential()
    host.add_module("site", layer.double())
    return host


@torch.no_grad()
def test_worked_example():
    """S = [[4, 0], [0, 8]] of size 2 x 2: Re(ifft2(S)) = [[3, -1], [-1, 3]]."""
    host = hosting(nn.Linear(2, 2, bias=False))
    host.site.weight.zero_()
    variant = FourierFT(n_frequency=2, scaling=10, targets=("site",))
    tensors = {"indices": torch.tensor([[0, 1], [0, 1]]), "fourierft_spectrum": tensor([4.0, 8.0])}
    for mode in ("live", "fused", "baked"):
        compiled = lorac.compile(host, {"a": lorac.Adapter("a", variant, {"site": tensors})}, mode=mode)
        expected = tensor([[30.0, -10.0], [-10.0, 30.0]])
        assert_close(compiled(torch.eye(2, dtype=torch.float64)), expected)
    assert isinstance(
        lorac.compile(host, {"a": lorac.Adapter("a", variant, {"site": tensors})}).pool["a"].changes["site"], Dense
    )


def test_constant_frequency_adds_the_same_everywhere():
    p = SimpleNamespace(indices=torch.tensor([[0], [0]]), fourierft_spectrum=tensor([6.0]))
    changed = FourierFT(n_frequency=1, scaling=2).weight(torch.zeros(3, 4, dtype=torch.float64), p)
    assert_close(changed, torch.ones(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("seed", [777, 3])
def test_positions_are_peft_s(seed):
    host = hosting(nn.Linear(7, 11))
    config = FourierFTConfig(n_frequency=20, random_loc_seed=seed, target_modules=["site"])
    expected = get_peft_model(host, config).base_model.model.site.indices["default"]
    fresh = hosting(nn.Linear(7, 11))
    variant = FourierFT(n_frequency=20, random_loc_seed=seed, targets=("site",))
    found = lorac.compile(fresh, {"a": variant}).adapters["a"].tensors["site"]["indices"]
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)
    assert len(set(map(tuple, found.t().tolist()))) == 20


@torch.no_grad()
def test_a_fresh_adapter_changes_the_output():
    host, x = hosting(nn.Linear(40, 30)), torch.randn(4, 40, dtype=torch.float64)
    compiled = lorac.compile(host, {"a": FourierFT(targets=("site",))})
    assert abs(compiled.adapters["a"].tensors["site"]["fourierft_spectrum"].std() - 1) < 0.1
    base = host(x)
    assert torch.linalg.vector_norm(compiled(x) - base) > torch.linalg.vector_norm(base)


def test_published_counts():
    """Table 2 of the paper: query and value of RoBERTa, n = 1000: base (12 layers) 0.024 M, large (24) 0.048 M."""
    site = Site("site", SiteKind.LINEAR, 768, 768, torch.float32, "site.weight")
    trained = math.prod(FourierFT().params(site)["fourierft_spectrum"].shape)
    assert (24 * trained, 48 * trained) == (24_000, 48_000)


def test_too_many_frequencies():
    site = lorac.sites(hosting(nn.Linear(7, 11)))["site"]
    with refuses("site_unsupported", match="has 77 values, and n_frequency is 78"):
        FourierFT(n_frequency=78).check(site)
    FourierFT(n_frequency=78, n_frequency_pattern={"site": 77}).at(site).check(site)
