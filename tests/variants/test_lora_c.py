"""LoRA-C and DoRA-C by hand, and on convolutions of every geometry."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lorac
from lorac.ir.algebra.changes import Delta, LowRank
from lorac.testing import Case, Oracle, assert_close
from lorac.testing import eager_checks as checks
from tests import parity
from tests.oracles import lora_c as oracle
from tests.refusing import refuses
from tests.variants.convs import GROUPED, OBLONG, SQUARE, conv_host


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def site_of(module):
    model = nn.Sequential()
    model.add_module("site", module)
    return lorac.sites(model)["site"]


@pytest.mark.medium("strides, dilations and another number of dimensions", keep=["strided", "dilated", "line"])
@pytest.mark.parametrize("host", SQUARE, ids=lambda host: host.name)
def test_every_geometry(host):
    case = Case(lorac.LoRAC(r=2, alpha=5, dora=True), host, Oracle.of(oracle))
    checks.check_formula(case)
    checks.check_modes(case)
    checks.check_identity_at_init(case)


@pytest.mark.medium("one switch each", keep=["grouped-False", "depthwise-True"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("host", GROUPED, ids=lambda host: host.name)
def test_groups(host, dora):
    """B·A is read into the kernel as it is stored, (O, I/g, k, k), so that it merges."""
    case = Case(lorac.LoRAC(r=2, alpha=5, dora=dora), host)
    checks.check_modes(case)
    checks.check_identity_at_init(case)
    p, module = case.a.tensors["site"], case.model.site
    kernel = module.weight + 2.5 * (p["lora_B"] @ p["lora_A"]).reshape(module.weight.shape)
    if dora:
        ones = (1,) * (kernel.ndim - 1)
        kernel = kernel * (p["magnitude"] / kernel.flatten(1).norm(dim=1)).view(-1, *ones)
    baked = lorac.compile(case.model, {"a": case.a}, mode="baked")
    assert_close(baked.host.site.weight, kernel)


@pytest.mark.parametrize("host", OBLONG, ids=lambda host: host.name)
def test_rejects_other_kernels(host):
    with refuses("site_unsupported", match=r"is 2 x 3|is 1 x 3 x 2"):
        lorac.compile(host.model(), {"a": lorac.LoRAC(targets=("site",))})


def test_places_the_entries_of_the_product():
    """O = 4, I = 3, k = 3: dW[2, 1, 0, 2] = s·(B·A)[7, 2]."""
    p = SimpleNamespace(lora_A=torch.randn(2 * 3, 3 * 3).double(), lora_B=torch.randn(4 * 3, 2 * 3).double())
    moved = lorac.LoRAC(r=2, alpha=5).weight(torch.zeros(4, 27, dtype=torch.float64), p).reshape(4, 3, 3, 3)
    assert_close(moved[2, 1, 0, 2], 2.5 * (p.lora_B @ p.lora_A)[7, 2])


def test_worked_dora():
    variant = lorac.LoRAC(r=1, alpha=1, dora=True)
    p = SimpleNamespace(lora_A=tensor([[1.0, -1.0]]), lora_B=tensor([[1.0], [0.0]]), magnitude=tensor([5.0, 5.0]))
    moved = variant.weight(tensor([[3.0, 4.0], [0.0, 5.0]]), p)
    assert_close(moved, tensor([[4.0, 3.0], [0.0, 5.0]]))


@pytest.mark.parametrize(
    "variant", [lorac.LoRAC(r=1, dora=True), lorac.CPLoRA(r=1, dora=True), lorac.DoRA(r=1)], ids=lambda v: v.name
)
@torch.no_grad()
def test_magnitudes_start_as_the_norms_of_the_channels(variant):
    """[3, 4] and [0, 5] are both of length 5."""
    model = nn.Sequential()
    model.add_module("site", nn.Conv2d(2, 2, 1).double())
    model.site.weight.copy_(tensor([[3.0, 4.0], [0.0, 5.0]])[:, :, None, None])
    fresh = lorac.compile(model, {"a": dataclasses.replace(variant, targets=("site",))}).adapters["a"]
    assert fresh.tensors["site"]["magnitude"].tolist() == [5.0, 5.0]


@torch.no_grad()
def test_rows_keep_the_magnitude():
    case = Case(lorac.LoRAC(r=2, alpha=5, dora=True), SQUARE[1])
    baked = lorac.compile(case.model, {"a": case.a}, mode="baked").host.site.weight
    assert_close(baked.flatten(1).norm(dim=1), case.a.tensors["site"]["magnitude"])


def test_gradients_past_the_norm():
    """dL/dm_o = ⟨dL/dW'[o], V[o]/‖V[o]‖⟩ and dL/dV = t·dL/dW', the norm held constant."""
    variant, W = lorac.LoRAC(r=2, alpha=4, dora=True), torch.randn(4, 27).double()
    p = SimpleNamespace(
        lora_A=torch.randn(6, 9).double(),
        lora_B=torch.randn(12, 6).double().requires_grad_(),
        magnitude=torch.rand(4).double().requires_grad_(),
    )
    upstream = torch.randn(4, 27).double()
    variant.weight(W, p).backward(upstream)
    V = (W + 2 * (p.lora_B @ p.lora_A).reshape(4, 27)).detach()
    norm = V.norm(dim=1, keepdim=True)
    assert_close(p.magnitude.grad, (upstream * V / norm).sum(1))
    into = (p.magnitude.detach()[:, None] / norm * upstream).reshape(12, 9)
    assert_close(p.lora_B.grad, 2 * into @ p.lora_A.t())


@torch.no_grad()
def test_form():
    """r·k² of low rank where that is cheaper than the kernel, else the kernel itself; always so for groups."""
    few = Case(lorac.LoRAC(r=1, dora=True), conv_host("wide", 16, 32, 3, (4, 4)))
    value = few.live.pool["a"].changes["site"]
    assert isinstance(value, LowRank)
    assert value.rank == 9
    assert set(value.scales) == {"c"}
    for host in (SQUARE[0], GROUPED[0]):
        assert isinstance(Case(lorac.LoRAC(r=2), host).live.pool["a"].changes["site"], Delta)


@torch.no_grad()
def test_a_linear_layer_has_a_lora():
    model = nn.Sequential()
    model.add_module("site", nn.Linear(7, 11))
    model.double()
    factors = {"lora_A": torch.randn(3, 7).double(), "lora_B": 0.03 * torch.randn(11, 3).double()}
    x = torch.randn(4, 7).double()
    answers = [
        lorac.compile(model, {"a": lorac.Adapter("a", method(r=3, alpha=5, targets=("site",)), {"site": factors})})(x)
        for method in (lorac.LoRAC, lorac.LoRA)
    ]
    parity.assert_parity(*answers, model(x))


def test_the_rank_may_exceed_the_channels():
    checks.check_modes(Case(lorac.LoRAC(r=16, alpha=5), SQUARE[0]))


MV_DECODER = SimpleNamespace(out=32, inputs=352, convolutions=6)
"""Six 3 x 3 convolutions to 32 channels, with 352 input channels between them."""


@pytest.mark.parametrize(("method", "per_rank"), [(lorac.LoRAC, 4896), (lorac.LoRA, 3360), (lorac.CPLoRA, 580)])
def test_published_counts(method, per_rank):
    with torch.device("meta"):
        modules = [nn.Conv2d(channels, 32, 3) for channels in (160, 64, 32, 32, 32, 32)]
    assert sum(m.in_channels for m in modules) == MV_DECODER.inputs
    assert sum(m.weight.numel() for m in modules) == 101_376
    specs = [spec for m in modules for spec in method(r=8).params(site_of(m)).values()]
    assert sum(math.prod(spec.shape) for spec in specs) == 8 * per_rank


def test_magnitudes_add_the_channels():
    site = site_of(nn.Conv2d(3, 8, 3))
    for method in (lorac.LoRAC, lorac.CPLoRA):
        plain, dora = (
            sum(math.prod(s.shape) for s in method(r=2, dora=d).params(site).values()) for d in (False, True)
        )
        assert dora - plain == 8
