"""HRA by hand: reflections as matrices, the compact form, and its start."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lorac
from lorac import HRA
from lorac.ir.algebra.changes import LowRank
from lorac.testing import HOSTS, assert_close, conformance
from tests.limits import assert_apart
from tests.oracles import hra as equations
from tests.refusing import refuses


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def applied(variant, weight, u):
    """W' of a linear layer with weight W, read off a baked model."""
    model = nn.Sequential()
    model.add_module("site", nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64))
    model.site.weight.data = weight
    variant = dataclasses.replace(variant, targets=("site",))
    baked = lorac.compile(model, {"a": lorac.Adapter("a", variant, {"site": {"hra_u": u}})}, mode="baked")
    return baked.host.site.weight.detach()


@pytest.mark.medium("the formula, and the kit's other checks of one pair", keep=["*-formula"])
@pytest.mark.parametrize(
    "check", conformance(HRA(r=4), equations, targets=(), hosts={"linear": HOSTS["linear"]}), ids=str
)
def test_two_pairs_conform(check):
    check()


@pytest.mark.medium("one sample of each kind of layer", keep=["*-variant0"])
@pytest.mark.parametrize("variant", [HRA(r=1), HRA(r=3), HRA(r=3, apply_GS=True)])
@pytest.mark.parametrize("host", ["linear", "transposed", "conv"])
@torch.no_grad()
def test_far_from_the_identity(variant, host):
    """What the kit cannot sample: an odd number of reflections moves an output by more than its measure takes."""
    model, x = HOSTS[host].model(), HOSTS[host].inputs((5,) if host != "conv" else (6,))
    site, base = lorac.sites(model)["site"], model(x)
    variant = dataclasses.replace(variant, targets=("site",))
    u = torch.randn(site.in_features, variant.r, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight, bias = site.present(model.site.weight.detach()).numpy(), model.site.bias.detach().numpy()
    adapted = equations.weight(weight, SimpleNamespace(hra_u=u.numpy()), variant)
    expected = torch.from_numpy(HOSTS[host].apply(x.numpy(), adapted, bias))
    adapter = lorac.Adapter("a", variant, {"site": {"hra_u": u}})
    for mode in ("live", "fused", "baked"):
        compiled = lorac.compile(model, {"a": adapter}, mode=mode)
        assert_close(compiled(x), expected)
        if mode != "baked":
            compiled.swap({"a": 0.3})
            assert_close(compiled(x), base + 0.3 * (expected - base))
    with torch.enable_grad():
        y = lorac.compile(model, {"a": adapter})(x)
    assert_close(y.detach(), expected)


def test_all_axes_reflected_is_the_negative():
    weight = tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    for variant in (HRA(r=2), HRA(r=2, apply_GS=True)):
        assert_close(applied(variant, weight, 7 * torch.eye(2, dtype=torch.float64)), -weight)


def test_order_of_two_reflections():
    """Two mirrors at 45 degrees are a turn by 90; the other order turns back."""
    u = tensor([[1.0, 1.0], [0.0, 1.0]])
    turn = tensor([[0.0, 1.0], [-1.0, 0.0]])
    eye = torch.eye(2, dtype=torch.float64)
    assert_close(applied(HRA(r=2), eye, u), turn)
    assert_close(applied(HRA(r=2), eye, u.flip(1)), turn.t())
    assert_close(applied(HRA(r=2, apply_GS=True), eye, u), -eye)  # only the span counts


@pytest.mark.parametrize("variant", [HRA(r=3), HRA(r=3, apply_GS=True), HRA(r=1)])
@pytest.mark.parametrize("host", ["linear", "conv"])
def test_is_low_rank(variant, host):
    compiled = lorac.compile(HOSTS[host].model(), {"a": dataclasses.replace(variant, targets=("site",))})
    value = compiled.pool["a"].changes["site"]
    assert isinstance(value, LowRank)
    assert value.rank == variant.r
    assert not value.scales
    assert value.e is None


@pytest.mark.parametrize("orthonormal", [False, True])
def test_keeps_the_length_of_rows(orthonormal):
    weight = torch.randn(5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = torch.randn(9, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = applied(HRA(r=4, apply_GS=orthonormal), weight, u)
    assert_close(found @ found.t(), weight @ weight.t())


@torch.no_grad()
def test_pairs_start_as_the_identity():
    model, x = HOSTS["linear"].model(), HOSTS["linear"].inputs((5,))
    for variant, unchanged in ((HRA(r=4), True), (HRA(r=3), False), (HRA(r=4, apply_GS=True), False)):
        assert variant.identity_at_init is unchanged
        compiled = lorac.compile(model, {"a": dataclasses.replace(variant, targets=("site",))})
        columns = compiled.adapters["a"].tensors["site"]["hra_u"]
        assert torch.equal(columns[:, 0], columns[:, 1]) is unchanged
        (assert_close if unchanged else assert_apart)(compiled(x), model(x))
        assert bool(torch.isfinite(compiled(x)).all())


def test_more_orthonormal_columns_than_dimensions():
    model = HOSTS["linear"].model()
    with refuses("site_unsupported", match=r"8 orthonormal columns in the 7 dimensions of 'site'"):
        lorac.compile(model, {"a": HRA(r=8, apply_GS=True, targets=("site",))})
    lorac.compile(model, {"a": HRA(r=8, targets=("site",))})
