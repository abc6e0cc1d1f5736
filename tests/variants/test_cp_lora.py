"""CP-LoRA and CP-DoRA by hand, and on convolutions of every geometry."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lorac
from lorac.ir.algebra.changes import Delta, LowRank
from lorac.testing import Case, assert_close
from lorac.testing import eager_checks as checks
from tests import parity
from tests.variants.convs import GROUPED, OBLONG, SQUARE, conv_host

LETTERS = {"cp_d": "t", "cp_h": "u", "cp_w": "v"}


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def outer(p):
    """The update of a kernel as it is stored, (O, I/g, …), without its scale."""
    axes = [name for name in LETTERS if name in p]
    letters = "".join(LETTERS[name] for name in axes)
    terms = ",".join(f"{letter}p" for letter in f"oi{letters}")
    return torch.einsum(f"{terms}->oi{letters}", *(p[name] for name in ("cp_out", "cp_in", *axes)))


@pytest.mark.medium("another number of dimensions, and groups", keep=["volume", "depthwise"])
@pytest.mark.parametrize("host", (*SQUARE, *OBLONG, *GROUPED), ids=lambda host: host.name)
@torch.no_grad()
def test_every_geometry(host):
    case = Case(lorac.CPLoRA(r=2, alpha=5, dora=True), host)
    checks.check_modes(case)
    checks.check_identity_at_init(case)
    p, module = case.a.tensors["site"], case.model.site
    kernel = module.weight + 2.5 * outer(p)
    kernel = kernel * (p["magnitude"] / kernel.flatten(1).norm(dim=1)).view(-1, *(1,) * (kernel.ndim - 1))
    baked = lorac.compile(case.model, {"a": case.a}, mode="baked")
    assert_close(baked.host.site.weight, kernel)


def test_worked_example():
    p = SimpleNamespace(
        cp_out=tensor([[2.0], [1.0]]),
        cp_in=tensor([[3.0]]),
        cp_h=tensor([[1.0], [-1.0]]),
        cp_w=tensor([[1.0], [2.0]]),
    )
    moved = lorac.CPLoRA(r=1, alpha=1).weight(torch.zeros(2, 4, dtype=torch.float64), p)
    assert moved.tolist() == [[6.0, 12.0, -6.0, -12.0], [3.0, 6.0, -3.0, -6.0]]


def test_worked_dora():
    one = tensor([[1.0]])
    p = SimpleNamespace(cp_out=tensor([[1.0], [0.0]]), cp_in=tensor([[1.0], [-1.0]]), cp_h=one, cp_w=one)
    p.magnitude = tensor([5.0, 5.0])
    moved = lorac.CPLoRA(r=1, alpha=1, dora=True).weight(tensor([[3.0, 4.0], [0.0, 5.0]]), p)
    assert_close(moved, tensor([[4.0, 3.0], [0.0, 5.0]]))


@pytest.mark.parametrize("dilation", [1, 2, 4])
@torch.no_grad()
def test_branch_form(dilation):
    """1 x 1 to r channels, one depthwise convolution per axis, 1 x 1 to the output."""
    host = conv_host("site", 3, 8, (3, 2), (11, 10), stride=(2, 1), padding=(dilation, 0), dilation=(dilation, 2))
    case = Case(lorac.CPLoRA(r=4, alpha=2), host)
    p, x = case.a.tensors["site"], case.x
    hidden = torch.einsum("nihw,ip->nphw", x, p["cp_in"])
    column, row = p["cp_h"].t()[:, None, :, None], p["cp_w"].t()[:, None, None, :]
    hidden = F.conv2d(hidden, column, stride=(2, 1), padding=(dilation, 0), dilation=(dilation, 1), groups=4)
    hidden = F.conv2d(hidden, row, dilation=(1, 2), groups=4)
    expected = case.base(x) + 0.5 * torch.einsum("nphw,op->nohw", hidden, p["cp_out"])
    parity.assert_parity(case.live(x), expected, case.base(x))


@torch.no_grad()
def test_every_unfolding_has_at_most_rank_r():
    case = Case(lorac.CPLoRA(r=2), conv_host("site", 6, 8, 3, (5, 5)))
    moved = outer(case.a.tensors["site"])
    ranks = [torch.linalg.matrix_rank(moved.movedim(axis, 0).flatten(1)) for axis in range(4)]
    assert ranks == [2, 2, 2, 2]


@torch.no_grad()
def test_form():
    """Rank r; for groups, whose kernels are small, the kernel itself."""
    wide = Case(lorac.CPLoRA(r=3, dora=True), SQUARE[0]).live.pool["a"].changes["site"]
    assert isinstance(wide, LowRank)
    assert wide.rank == 3
    assert "c" in wide.scales
    for host in GROUPED:
        assert isinstance(Case(lorac.CPLoRA(r=2), host).live.pool["a"].changes["site"], Delta)


@torch.no_grad()
def test_a_linear_layer_has_a_lora():
    model = nn.Sequential()
    model.add_module("site", nn.Linear(7, 11))
    model.double()
    up, down, x = 0.03 * torch.randn(11, 3).double(), torch.randn(3, 7).double(), torch.randn(4, 7).double()
    cp = {"cp_out": up, "cp_in": down.t().contiguous()}
    lora = {"lora_A": down, "lora_B": up}
    answers = [
        lorac.compile(model, {"a": lorac.Adapter("a", method(r=3, alpha=5, targets=("site",)), {"site": tensors})})(x)
        for method, tensors in ((lorac.CPLoRA, cp), (lorac.LoRA, lora))
    ]
    parity.assert_parity(*answers, model(x))


def test_start():
    """The output factor is 0, the others are kaiming-uniform over the length of their axis."""
    model = conv_host("site", 16, 8, 3, (5, 5)).model()
    p = lorac.compile(model, {"a": lorac.CPLoRA(r=64, targets=("site",))}).adapters["a"].tensors["site"]
    assert list(p) == ["cp_out", "cp_in", "cp_h", "cp_w"]
    assert not p["cp_out"].any()
    for name, length in (("cp_in", 16), ("cp_h", 3), ("cp_w", 3)):
        assert 0.95 * length**-0.5 < p[name].abs().max() <= length**-0.5
