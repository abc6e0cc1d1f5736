"""LoLDU by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lorac
from lorac import Role
from lorac.ir.algebra.changes import Delta, LowRank
from lorac.testing import HOSTS, Case, assert_close
from tests import parity
from tests.refusing import refuses


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def hosting(module):
    model = nn.Sequential()
    model.add_module("site", module)
    return model.double().eval()


def linear(weight):
    rows = tensor(weight)
    model = hosting(nn.Linear(rows.shape[1], rows.shape[0], bias=False))
    model.site.weight.data = rows
    return model


def fresh(model, **fields):
    adapter = lorac.compile(model, {"a": lorac.LoLDU(targets=("site",), **fields)}).adapters["a"]
    return adapter.variant, adapter.tensors["site"]


WORKED = [[2.0, 1.0], [4.0, 5.0]]


@torch.no_grad()
def test_worked_factors():
    _, whole = fresh(linear(WORKED), r=2)
    assert whole["lora_B"].tolist() == [[0.5, 1.0], [1.0, 0.0]]
    assert whole["lora_A"].tolist() == [[1.0, 1.25], [0.0, 1.0]]
    assert whole["diagonal"].tolist() == whole["vector_z"].tolist() == [4.0, -1.5]


@torch.no_grad()
def test_worked_update():
    model = linear(WORKED)
    variant, tensors = fresh(model, r=1)
    assert variant.weight(model.site.weight, SimpleNamespace(**{**tensors, "vector_z": tensor([0.0])})).tolist() == [
        [0.0, -1.5],
        [0.0, 0.0],
    ]
    tensors["vector_z"].fill_(8.0)
    for mode in ("live", "fused", "baked"):
        compiled = lorac.compile(model, {"a": lorac.Adapter("a", variant, {"site": tensors})}, mode=mode)
        assert compiled(torch.eye(2, dtype=torch.float64)).t().tolist() == [[4.0, 3.5], [8.0, 10.0]]


@pytest.mark.parametrize("shape", [(11, 7), (6, 12)])
@torch.no_grad()
def test_all_terms_are_the_weight(shape):
    model = hosting(nn.Linear(shape[1], shape[0]))
    _, p = fresh(model, r=min(shape))
    product = p["lora_B"] @ torch.diag(p["diagonal"]) @ p["lora_A"]
    # So of the paper's residual nothing is left.
    assert_close(product, model.site.weight)
    assert p["lora_B"].abs().max() == 1


@torch.no_grad()
def test_factorises_an_embedding_as_stored():
    model = hosting(nn.Embedding(13, 6))
    _, p = fresh(model, r=6)
    product = (p["lora_B"] * p["diagonal"]) @ p["lora_A"]
    assert_close(product, model.site.weight.t())
    assert p["lora_A"].abs().max() == 1, "the unit triangle, with entries up to 1, is on the side of the vocabulary"


@torch.no_grad()
def test_a_singular_block_starts_from_the_base():
    model = linear([[0.0, 1.0, 2.0], [0.0, 3.0, 4.0], [0.0, 0.0, 5.0]])
    variant, p = fresh(model, r=3)
    assert p["diagonal"][0] == p["vector_z"][0] == 0
    assert torch.equal(variant.weight(model.site.weight, SimpleNamespace(**p)), model.site.weight)
    assert all(bool(torch.isfinite(t).all()) for t in p.values())


@torch.no_grad()
def test_scaling_sigma_and_z_cancel():
    case = Case(lorac.LoLDU(r=3, alpha=5, train_sigma=True), HOSTS["linear"])
    p = case.a.tensors["site"]
    scaled = {**p, "scaling_factor": p["scaling_factor"] * 4, "vector_z": p["vector_z"] / 4}
    other = lorac.Adapter("a", case.a.variant, {"site": scaled})
    parity.assert_parity(lorac.compile(case.model, {"a": other})(case.x), case.live(case.x), case.base(case.x))


@torch.no_grad()
def test_is_a_lora():
    case = Case(lorac.LoLDU(r=3, alpha=5), HOSTS["linear"])
    p = case.a.tensors["site"]
    core = 5 / 3 * (p["vector_z"] - p["diagonal"])
    factors = {"lora_A": core[:, None] * p["lora_A"], "lora_B": p["lora_B"]}
    lora = lorac.Adapter("b", lorac.LoRA(r=3, alpha=3, targets=("site",)), {"site": factors})
    parity.assert_parity(case.live(case.x), lorac.compile(case.model, {"b": lora})(case.x), case.base(case.x))


def test_gradient():
    """∂L/∂z_i = σ·(P·L_r[:, i])ᵀ·G·U_r[i], G the gradient of W'."""
    case = Case(lorac.LoLDU(r=3, alpha=5), HOSTS["linear"])
    compiled = lorac.compile(case.model, {"a": case.a})
    p, upstream = compiled.adapters["a"].tensors["site"], torch.randn_like(case.base(case.x))
    compiled(case.x).backward(upstream)
    dense = upstream.flatten(0, -2).t() @ case.x.flatten(0, -2)
    expected = 5 / 3 * torch.einsum("oi,oc,ic->i", p["lora_B"], dense, p["lora_A"])
    assert_close(p["vector_z"].grad, expected)


def test_form():
    model = hosting(nn.Linear(7, 11))
    few = lorac.compile(model, {"a": lorac.LoLDU(r=3, targets=("site",))}).pool["a"].changes["site"]
    assert isinstance(few, LowRank)
    assert few.rank == 3
    assert not few.scales
    # r = k factors cost more than the weight itself.
    many = lorac.compile(model, {"a": lorac.LoLDU(r=7, targets=("site",))}).pool["a"].changes["site"]
    assert isinstance(many, Delta)


@pytest.mark.parametrize(
    ("init", "starts"),
    [
        ("lu", torch.equal),
        ("uniform", lambda z, d: bool((z.abs() <= d.mean().abs() / 2).all()) and z.unique().numel() == len(z)),
        ("normal", lambda z, d: not torch.equal(z, d) and abs(z.mean() - d.mean()) < d.std()),
        ("constant", lambda z, d: torch.equal(z, d.mean().expand_as(z))),
        ("s_uniform", lambda z, d: bool((z.abs() <= 1).all()) and z.std() > 0.3),
        ("s_normal", lambda z, d: 0.6 < z.std() < 1.4),
        ("ones", lambda z, d: torch.equal(z, torch.ones_like(z))),
        ("zeros", lambda z, d: not z.any()),
    ],
)
@torch.no_grad()
def test_starts(init, starts):
    torch.manual_seed(0)
    model = hosting(nn.Linear(40, 50))
    variant, p = fresh(model, r=32, init=init)
    assert starts(p["vector_z"], p["diagonal"])
    start = variant.weight(model.site.weight, SimpleNamespace(**p))
    assert torch.equal(start, model.site.weight) == (init == "lu")


@torch.no_grad()
def test_the_released_sigma():
    """The code's defaults, r = 4 and alpha = 1, scale by 1/4."""
    assert lorac.LoLDU(r=4, alpha=1).sigma == 0.25
    assert lorac.LoLDU(r=4).sigma == 1
    _, p = fresh(hosting(nn.Linear(7, 11)), r=4, alpha=1, train_sigma=True)
    assert p["scaling_factor"].item() == 0.25


@pytest.mark.parametrize(("r", "total"), [(768, 18_432), (1, 24)])
def test_published_counts(r, total):
    """ViT-B/16, q and v."""
    with torch.device("meta"):
        model = nn.ModuleDict({f"{name}{i}": nn.Linear(768, 768) for i in range(12) for name in "qv"})
    specs = [lorac.LoLDU(r=r).params(site) for site in lorac.sites(model).values()]
    trained = [spec.shape for at in specs for spec in at.values() if spec.role is Role.TRAINABLE]
    assert sum(math.prod(shape) for shape in trained) == total


def test_refusals():
    with refuses("site_unsupported", match="takes r up to 7") as refused:
        lorac.compile(hosting(nn.Linear(7, 11)), {"a": lorac.LoLDU(r=8, targets=("site",))})
    assert refused.value.nearest == "r=7"
    with refuses("site_unsupported", match="2 groups"):
        lorac.compile(hosting(nn.Conv2d(4, 6, 3, groups=2)), {"a": lorac.LoLDU(r=2, targets=("site",))})
    with pytest.raises(lorac.OptionError, match="no init='unifrom'") as unknown:
        lorac.LoLDU(init="unifrom")
    assert unknown.value.nearest == "uniform"


@torch.no_grad()
def test_factorises_a_kernel_as_a_matrix():
    model = hosting(nn.Conv2d(3, 8, 3, padding=1))
    _, p = fresh(model, r=8)
    product = (p["lora_B"] * p["diagonal"]) @ p["lora_A"]
    assert_close(product, model.site.weight.flatten(1))
