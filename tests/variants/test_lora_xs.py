"""LoRA-XS by hand: a core between the weight's own singular vectors."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lorac
from lorac import Role, Site, SiteKind
from lorac.ir.algebra.changes import LowRank
from lorac.testing import HOSTS, Case, assert_close
from tests import parity
from tests.limits import FIRST_ORDER, assert_deviation, assert_sketched
from tests.refusing import refuses


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def fresh(model, **fields):
    compiled = lorac.compile(model, {"a": lorac.LoRAXS(targets=("site",), **fields)}, mode="fused", active=None)
    return compiled.adapters["a"]


def best(W, r):
    """The truncated SVD of W."""
    u, s, v = torch.linalg.svd(W, full_matrices=False)
    return (u[:, :r] * s[:r]) @ v[:r]


@torch.no_grad()
def merged(model, adapter, core):
    adapter.tensors["site"]["lora_latent"].copy_(core)
    return lorac.compile(model, {"a": adapter}, mode="baked").host.site.weight


@pytest.mark.parametrize(("r", "host"), [(3, "linear"), (2, "no_bias")])
def test_an_identity_core_adds_the_truncated_weight(r, host):
    model = HOSTS[host].model()
    weight, adapter = model.site.weight.detach(), fresh(model, r=r, alpha=r)
    assert_close(merged(model, adapter, torch.eye(r)), weight + best(weight, r))
    assert torch.equal(merged(model, adapter, torch.zeros(r, r)), weight)


def test_factors_are_frozen_singular_vectors():
    model = HOSTS["linear"].model()
    p = fresh(model, r=3).tensors["site"]
    b, a = p["lora_B"], p["lora_A"]
    assert_close(b.t() @ b, torch.eye(3, dtype=torch.float64))
    values = torch.linalg.svdvals(model.site.weight.detach())[:3]
    assert_close(a @ a.t(), torch.diag(values.square()))
    assert (b.gather(0, b.abs().argmax(0, keepdim=True)) > 0).all()
    assert_deviation(p["lora_latent"], 1e-5)
    again = fresh(model, r=3).tensors["site"]
    assert all(torch.equal(again[name], tensor) for name, tensor in p.items())


def test_a_large_weight_is_decomposed_from_a_sketch():
    """600 x 640, with a spectrum that falls slowly: the sketch finds what the whole SVD does."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(640, 600, generator=generator, dtype=torch.float64)
    weight *= torch.arange(1, 601, dtype=torch.float64) ** -0.5
    model = nn.Sequential()
    model.add_module("site", nn.Linear(600, 640, bias=False, dtype=torch.float64))
    model.site.weight.data.copy_(weight)
    state = torch.get_rng_state()
    p = fresh(model, r=4).tensors["site"]
    assert torch.equal(torch.get_rng_state(), state)
    expected = best(weight, 4)
    assert_sketched(p["lora_B"] @ p["lora_A"], expected)


@torch.no_grad()
def test_is_the_lora_with_the_core_folded_in():
    case = Case(lorac.LoRAXS(r=3, alpha=5), HOSTS["linear"])
    p = case.a.tensors["site"]
    tensors = {"lora_A": p["lora_latent"] @ p["lora_A"], "lora_B": p["lora_B"]}
    lora = lorac.Adapter("b", lorac.LoRA(r=3, alpha=5, targets=("site",)), {"site": tensors})
    parity.assert_parity(case.live(case.x), lorac.compile(case.model, {"b": lora})(case.x), case.base(case.x))
    value = case.live.pool["a"].changes["site"]
    assert isinstance(value, LowRank)
    assert value.rank == 3


def test_gradient_of_the_core_is_that_of_the_weight_projected():
    case = Case(lorac.LoRAXS(r=3, alpha=5), HOSTS["linear"])
    compiled = case.compiled(case.a).train()
    compiled(case.x).square().sum().backward()
    p = compiled.adapters["a"].tensors["site"]
    y = compiled(case.x).detach()
    of_weight = (2 * y).t() @ case.x
    assert_close(p["lora_latent"].grad, 5 / 3 * p["lora_B"].t() @ of_weight @ p["lora_A"].t())


def test_rejects_a_rank_above_the_number_of_singular_vectors():
    with refuses("site_unsupported", match="fewer than the 8 singular vectors") as error:
        lorac.compile(HOSTS["linear"].model(), {"a": lorac.LoRAXS(r=8, targets=("site",))})
    assert error.value.nearest == "r=7"


@pytest.mark.parametrize(
    ("r", "shapes", "total"),
    [
        (96, 32 * [(4096, 4096)] * 2 + 32 * [(1024, 4096)] * 2 + 32 * [(14336, 4096)] * 3, 2_064_384),
        (24, 24 * [(1024, 1024)] * 2 + 24 * [(1024, 1024), (1024, 4096)], 55_296),
    ],
    ids=["mistral-7b", "roberta-large"],
)
def test_published_counts(r, shapes, total):
    variant = lorac.LoRAXS(r=r)
    sites = [Site("site", SiteKind.LINEAR, out, columns, torch.float32, "site.weight") for out, columns in shapes]
    specs = [spec for site in sites for spec in variant.params(site).values() if spec.role is Role.TRAINABLE]
    assert sum(math.prod(spec.shape) for spec in specs) == total


def test_sb_worked_example():
    """G = [[3,1],[2,5]], η = 0.1: every entry of the first step is −0.1, of rank one."""
    gradient = torch.tensor([[3.0, 1], [2, 5]], dtype=torch.float64)
    update = -0.1 * gradient.sign()
    p = lorac.LoRAXS.from_update({"site": update}, name="sb", r=1).tensors["site"]
    assert_close(p["lora_latent"], torch.tensor([[0.2]], dtype=torch.float64))
    assert_close(p["lora_B"] @ p["lora_latent"] @ p["lora_A"], update)


@torch.no_grad()
@pytest.mark.parametrize("alpha", [None, 5.0])
@pytest.mark.parametrize("r", [3, 7])
def test_sb_begins_at_the_best_update_of_its_rank(r, alpha):
    """Whatever its scale; with all singular vectors, at the whole step."""
    model = HOSTS["linear"].model()
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(model.site.weight.shape, generator=generator, dtype=torch.float64)
    update = -0.1 * gradient.sign()
    adapter = lorac.LoRAXS.from_update({"site": update}, name="sb", r=r, alpha=alpha)
    p, identity = adapter.tensors["site"], torch.eye(r, dtype=torch.float64)
    assert_close(p["lora_B"].t() @ p["lora_B"], identity)
    assert_close(p["lora_A"] @ p["lora_A"].t(), identity)
    expected = update if r == 7 else best(update, r)
    found = lorac.compile(model, {"a": adapter}, mode="baked").host.site.weight
    assert_close(found, model.site.weight + expected)


def test_sb_leaves_the_tail_of_the_singular_values():
    """diag(3, 2, 1) in other axes, r = 2: what B·R·A misses has the singular values 1, 0, 0."""
    turn = torch.linalg.qr(torch.arange(16.0, dtype=torch.float64).sin().reshape(4, 4)).Q
    update = turn[:, :3] * tensor([3.0, 2.0, 1.0])
    p = lorac.LoRAXS.from_update({"site": update}, name="sb", r=2).tensors["site"]
    missed = torch.linalg.svdvals(update - p["lora_B"] @ p["lora_latent"] @ p["lora_A"])
    assert_close(missed, tensor([1.0, 0.0, 0.0]))
    assert_close(p["lora_latent"], torch.diag(tensor([3.0, 2.0])))


def test_sb_goes_down_with_a_small_step():
    """By η·‖g^R‖² to first order, η = 1e-4: the step is along the core's own gradient."""
    case = Case(lorac.LoRA(r=1), HOSTS["linear"])
    model, x = case.model, case.x
    target = torch.linspace(-2, 2, 12 * 11, dtype=torch.float64).sin().reshape(12, 11)
    loss = (model(x) - target).square().sum()
    (gradient,) = torch.autograd.grad(loss, model.site.weight)
    adapter = lorac.LoRAXS.from_update({"site": -1e-3 * gradient.sign()}, name="sb", r=2)
    compiled = lorac.compile(model, {"sb": adapter})
    core = compiled.adapters["sb"].tensors["site"]["lora_latent"]
    before = (compiled(x) - target).square().sum()
    before.backward()
    with torch.no_grad():
        expected = 1e-4 * core.grad.square().sum()
        core -= 1e-4 * core.grad
        after = (lorac.compile(model, {"sb": compiled.adapters["sb"]})(x) - target).square().sum()
    assert after < before
    assert abs(before.detach() - after - expected) <= FIRST_ORDER * expected


def test_sb_trains_its_core_alone_by_the_projected_gradient():
    """g̃ = BBᵀ·g·AᵀA for a step on R, at s = 1."""
    model = HOSTS["linear"].model()
    update = torch.linspace(-1, 1, model.site.weight.numel(), dtype=torch.float64).sin().reshape_as(model.site.weight)
    adapter = lorac.LoRAXS.from_update({"site": update}, name="sb", r=2)
    compiled = lorac.compile(model, {"a": adapter})
    assert [t.shape for t in compiled.parameters() if t.requires_grad] == [(2, 2)]
    own = compiled.adapters["a"].tensors["site"]
    weight = adapter.variant.weight(model.site.weight.detach(), SimpleNamespace(**own))
    (gradient,) = torch.autograd.grad(weight.square().sum(), own["lora_latent"])
    step = own["lora_B"] @ gradient @ own["lora_A"]
    full = 2 * weight.detach()
    b, a = own["lora_B"], own["lora_A"]
    assert_close(step, b @ b.t() @ full @ a.t() @ a)


def test_sb_needs_an_update_of_that_rank():
    with refuses("shape_mismatch", match=r"the update of 'site' has the shape \[3, 2\], and fewer than 4 singular"):
        lorac.LoRAXS.from_update({"site": torch.zeros(3, 2)}, name="sb", r=4)
