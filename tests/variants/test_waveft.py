"""WaveFT: its filters, positions and inverse transform against PEFT's, and what its change is."""

from types import SimpleNamespace

import pytest
import torch
from peft import WaveFTConfig, get_peft_model
from torch import nn

import lorac
from lorac import WaveFT
from lorac.ir.algebra.changes import Dense, Sparse
from lorac.testing import HOSTS, assert_close, conformance
from lorac.variants.fourierft import WAVELETS
from tests.oracles import waveft as equations
from tests.refusing import refuses


def hosting(out, columns):
    host = nn.Sequential()
    host.add_module("site", nn.Linear(columns, out).double())
    return host


@pytest.mark.medium("the formula, and the kit's other checks of Haar's wavelet", keep=["*-formula"])
@pytest.mark.parametrize(
    "check",
    conformance(
        WaveFT(**{**equations.FIELDS, "wavelet_family": "db2"}),
        equations,
        targets=(),
        hosts={"linear": HOSTS["linear"]},
    ),
    ids=str,
)
def test_a_longer_wavelet_conforms(check):
    check()


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_change_is_peft_s(wavelet):
    """PEFT's tables have eleven digits, more than float32."""
    host = hosting(11, 14)
    config = WaveFTConfig(n_frequency=40, wavelet_family=wavelet, random_loc_seed=3, target_modules=["site"])
    layer = get_peft_model(host, config).base_model.model.site
    values = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer.waveft_spectrum["default"].data = values
    variant = WaveFT(n_frequency=40, wavelet_family=wavelet, random_loc_seed=3)
    site = lorac.sites(hosting(11, 14))["site"]
    p = SimpleNamespace(indices=variant.positions(site), waveft_spectrum=values)
    assert torch.equal(p.indices, layer.waveft_indices["default"])
    expected = layer.get_delta_weight("default").detach()
    assert_close(variant.weight(torch.zeros_like(expected), p).float(), expected.float())


def test_worked_example():
    """A mean of 2 over a square of Haar's wavelet is 1 in each of its entries."""
    p = SimpleNamespace(indices=torch.tensor([[0], [1]]), waveft_spectrum=torch.tensor([2.0]))
    found = WaveFT(n_frequency=1, scaling=3).weight(torch.zeros(4, 4), p)
    expected = torch.zeros(4, 4)
    expected[:2, 2:] = 3
    assert_close(found, expected)


@torch.no_grad()
def test_starts_as_the_base_and_without_transform_is_sparse():
    host, x = hosting(11, 14), torch.randn(4, 14, dtype=torch.float64)
    for transformed, kind in ((True, Dense), (False, Sparse)):
        variant = WaveFT(n_frequency=20, use_idwt=transformed, targets=("site",))
        compiled = lorac.compile(host, {"a": variant})
        assert torch.equal(compiled(x), host(x))
        assert isinstance(compiled.pool["a"].changes["site"], kind)


def test_rejects_other_wavelets():
    with refuses("option_error", match=r"WaveFT takes no wavelet_family=.coif1.\n  it takes db1, db2"):
        WaveFT(wavelet_family="coif1")
