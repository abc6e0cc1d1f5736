"""LoRA and DoRA on convolutions are convLoRA and convDoRA: two kernels, X (r, I, kh, kw) and Y (O, r, 1, 1)."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lorac
from lorac.ir.algebra.changes import LowRank
from lorac.testing import Case
from lorac.testing import eager_checks as checks
from tests import parity
from tests.limits import rank_of
from tests.variants.convs import OBLONG, SQUARE

HOSTS = {host.name: host for host in (*SQUARE, *OBLONG)}


@pytest.mark.medium("each geometry once", keep=["far-DoRA", "volume-LoRA", "oblong-LoRA"])
@pytest.mark.parametrize("method", [lorac.LoRA, lorac.DoRA])
@pytest.mark.parametrize("host", ["far", "volume", "oblong"])
def test_every_geometry(method, host):
    case = Case(method(r=3, alpha=5), HOSTS[host])
    checks.check_modes(case)
    checks.check_identity_at_init(case)


@pytest.mark.parametrize("dilation", [1, 2, 4])
@pytest.mark.parametrize("dora", [False, True])
@torch.no_grad()
def test_branch_form(dora, dilation):
    """y = b + t·(W*x + s·Y*(X*x)), X with the base's stride, padding and dilation, t = m/‖V‖ or 1."""
    model = nn.Sequential()
    model.add_module("site", nn.Conv2d(3, 8, 3, stride=2, padding=dilation, dilation=dilation))
    model.double().eval()
    x = torch.randn(2, 3, 11, 12, dtype=torch.float64)
    method = lorac.DoRA if dora else lorac.LoRA
    compiled = lorac.compile(model, {"a": method(r=4, alpha=2, targets=("site",))})
    p, base = compiled.adapters["a"].tensors["site"], model.site
    p["lora_B"].normal_(0, 0.3)
    X, Y = p["lora_A"].reshape(4, 3, 3, 3), p["lora_B"].reshape(8, 4, 1, 1)
    geometry = {"stride": base.stride, "padding": base.padding, "dilation": base.dilation}
    linear = F.conv2d(x, base.weight, **geometry) + 0.5 * F.conv2d(F.conv2d(x, X, **geometry), Y)
    if dora:
        V = base.weight + 0.5 * torch.einsum("opxy,piuv->oiuv", Y, X)
        linear = (p["magnitude"] / V.flatten(1).norm(dim=1))[:, None, None] * linear
    # What was drawn since is another adapter.
    compiled = lorac.compile(model, {"a": compiled.adapters["a"]})
    parity.assert_parity(compiled(x), linear + base.bias[:, None, None], model(x))
    assert isinstance(compiled.pool["a"].changes["site"], LowRank)


@torch.no_grad()
def test_the_unfolded_update_has_rank_r():
    """O x I·k² = 8 x 27, whichever mode is large: at most r, and r away from init."""
    case = Case(lorac.LoRA(r=3, alpha=5), HOSTS["strided"])
    moved = lorac.compile(case.model, {"a": case.a}, mode="baked").host.site.weight - case.model.site.weight
    assert rank_of(moved.flatten(1)) == 3
