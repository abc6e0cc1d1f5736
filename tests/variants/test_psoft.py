"""PSOFT: its factors against PEFT's, what it keeps of the weight, and files that fit one base alone."""

import pytest
import torch
from peft import PsoftConfig, get_peft_model
from torch import nn

import lorac
from lorac import PSOFT
from lorac.testing import HOSTS, assert_close, conformance
from tests.oracles import psoft as equations
from tests.peft_files import save_small
from tests.refusing import refuses
from tests.zoo import ZOO


def hosting(out, columns):
    host = nn.Sequential()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        host.add_module("site", nn.Linear(columns, out))
    return host


@pytest.mark.medium("the formula, and the kit's other checks of the inverse", keep=["*-formula"])
@pytest.mark.parametrize(
    "check",
    conformance(
        PSOFT(r=3, alpha=5.0, use_cayley_neumann=True, num_cayley_neumann_terms=6, cayley_neumann_eps=0.01),
        equations,
        targets=(),
        hosts={"linear": HOSTS["linear"]},
    ),
    ids=str,
)
def test_bounded_series_conforms(check):
    check()


@pytest.mark.parametrize(
    "settings",
    [{}, {"ab_svd_init": "pissa_init"}, {"psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 2, "random_seed": 5}],
    ids=str,
)
@pytest.mark.parametrize("shape", [(11, 14), (14, 11)])
def test_factors_are_peft_s(settings, shape):
    config = PsoftConfig(r=4, psoft_alpha=6, target_modules=["site"], **settings)
    layer = get_peft_model(hosting(*shape), config).base_model.model.site
    expected = layer._get_psoft_ab_cache_buffers("default")
    compiled = lorac.compile(hosting(*shape), {"a": PSOFT(r=4, alpha=6, targets=("site",), **settings)})
    found = compiled.adapters["a"].tensors["site"]
    for name, factor in zip(("psoft_A", "psoft_B"), expected, strict=True):
        assert_close(found[name].detach(), factor)


@torch.no_grad()
def test_rotation_alone_keeps_the_singular_values_of_the_subspace():
    host = hosting(11, 14).double()
    variant = PSOFT(r=11, alpha=11, psoft_mag_a=False, psoft_mag_b=False, targets=("site",))
    adapter = lorac.compile(host, {"a": variant}).adapters["a"]
    upper = adapter.tensors["site"]["psoft_R"]
    upper.copy_(torch.randn(upper.shape, generator=torch.Generator().manual_seed(0)))
    weight = lorac.compile(host, {"a": adapter}, mode="baked").host.site.weight
    assert_close((weight @ weight.t()).trace().float(), (host.site.weight @ host.site.weight.t()).trace().float())
    assert float((weight - host.site.weight).norm() / weight.norm()) > 0.1


@torch.no_grad()
def test_starts_as_the_base_without_turning():
    host, x = hosting(11, 14), torch.randn(3, 14)
    for variant in (PSOFT(r=3), PSOFT(r=1), PSOFT(r=3, psoft_orth=False, psoft_mag_a=False)):
        compiled = lorac.compile(host, {"a": variant})
        assert_close(compiled(x), host(x))


def test_files_are_made_for_one_base_alone(tmp_path):
    """PEFT makes the factors anew, so that an adapter with factors of another base is not written for this one."""
    model, folder = ZOO["plain_mlp"].model(), save_small(tmp_path / "a", "PSOFT")
    with refuses("base_needed", match="pass model="):
        lorac.load_adapter(folder)
    adapter = lorac.load_adapter(folder, model)
    with refuses("base_needed", match="from the base's weight"):
        lorac.save_adapter(adapter, tmp_path / "b")
    adapter.tensors["up"]["psoft_A"] = 2 * adapter.tensors["up"]["psoft_A"]
    with refuses("unsupported_field", match="'psoft_A' at 'up' is not the one that PEFT computes"):
        lorac.save_adapter(adapter, tmp_path / "b", model=model)
    lorac.save_adapter(adapter, tmp_path / "b.safetensors", model=model, format="native")
    assert lorac.load_adapter(tmp_path / "b.safetensors", model).variant == adapter.variant
