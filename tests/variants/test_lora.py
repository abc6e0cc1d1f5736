"""LoRA and rsLoRA by hand, and against PEFT."""

import math
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from torch import nn

import lorac
from lorac.testing import HOSTS, Case, assert_close
from tests import parity, peft_files
from tests.limits import assert_apart
from tests.refusing import refuses


class Two(nn.Module):
    """Two non-square layers, so that per-module ranks and alphas can differ."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(7, 11), nn.Linear(11, 5)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def lora_of(tensors, **fields):
    return lorac.Adapter("a", lorac.LoRA(targets=("site",), **fields), {"site": tensors})


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("mode", ["live", "fused", "baked"])
@torch.no_grad()
def test_worked_example(mode):
    model = nn.Sequential()
    model.add_module("site", nn.Linear(2, 2, bias=False, dtype=torch.float64))
    model.site.weight.data = tensor([[1.0, 2.0], [3.0, 4.0]])
    adapter = lora_of({"lora_A": tensor([[1.0, -1.0]]), "lora_B": tensor([[0.5], [2.0]])}, r=1, alpha=2)

    compiled = lorac.compile(model, {"a": adapter}, mode=mode)

    assert compiled(tensor([[1.0, 2.0]])).tolist() == [[4.0, 7.0]]
    merged = adapter.variant.weight(model.site.weight, SimpleNamespace(**adapter.tensors["site"]))
    assert merged.tolist() == [[2.0, 1.0], [7.0, 0.0]]


def test_scale():
    assert lorac.LoRA(r=4, alpha=8).scale == 2
    assert lorac.LoRA(r=4, alpha=8, rslora=True).scale == 4
    assert lorac.LoRA(r=3, alpha=5, rslora=True).scale == 5 / math.sqrt(3)


@pytest.mark.parametrize("mode", ["live", "fused"])
@pytest.mark.parametrize("host", ["linear", "no_bias", "transposed", "conv", "embedding"])
@torch.no_grad()
def test_a_fresh_adapter_equals_the_base_bit_for_bit(host, mode):
    case = Case(lorac.LoRA(r=3, alpha=5), HOSTS[host])
    compiled = lorac.compile(case.model, {"a": case.variant}, mode=mode)
    assert torch.equal(compiled(case.x), case.base(case.x))


@torch.no_grad()
def test_padding_and_permuting_the_rank_change_nothing(case):
    x, tensors = case.x, case.a.tensors["site"]
    a, b = tensors["lora_A"], tensors["lora_B"]
    order = torch.tensor([2, 0, 1])
    padded = {"lora_A": nn.functional.pad(a, (0, 0, 0, 2)), "lora_B": nn.functional.pad(b, (0, 2))}
    permuted = {"lora_A": a[order], "lora_B": b[:, order]}
    reference = case.live(x)
    for changed, r in ((padded, 5), (permuted, 3)):
        # The scale alpha / r stays.
        adapter = lora_of(changed, r=r, alpha=5 / 3 * r)
        parity.assert_parity(lorac.compile(case.model, {"a": adapter})(x), reference, case.base(x))


@pytest.fixture
def case():
    return Case(lorac.LoRA(r=3, alpha=5), HOSTS["linear"])


@torch.no_grad()
def test_a_grouped_convolution_runs_and_rejects_merging():
    """A mixes all input channels, so W' leaves the blocks a grouped kernel can hold."""
    model = nn.Sequential()
    model.add_module("site", nn.Conv2d(4, 6, 3, groups=2, dtype=torch.float64))
    variant = lorac.LoRA(r=2, targets=("site",))
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    compiled = lorac.compile(model, {"a": variant}, mode="live")
    tensors = compiled.adapters["a"].tensors["site"]
    tensors["lora_B"].normal_()
    kernel = (variant.scale * tensors["lora_B"] @ tensors["lora_A"]).reshape(6, 4, 3, 3)
    expected = model(x) + nn.functional.conv2d(x, kernel)
    assert_close(compiled(x), expected)
    with refuses("not_mergeable"):
        lorac.compile(model, {"a": compiled.adapters["a"]}, mode="fused")


@pytest.mark.medium("the other, and end_to_end/test_peft_types.py has patterns", cases=["True"])
@pytest.mark.parametrize("rslora", [False, True])
@torch.no_grad()
def test_peft_with_patterns(tmp_path, rslora):
    model, x = Two().double().eval(), torch.randn(3, 4, 7, dtype=torch.float64)
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=rslora,
        target_modules=["first", "second"],
        rank_pattern={"second": 2},
        alpha_pattern={"first": 7},
    )
    oracle = peft_files.make_peft(model, tmp_path, config, inputs={"x": x})
    for mode in ("live", "fused", "baked"):
        compiled = lorac.compile(model, [tmp_path], mode=mode)
        parity.assert_parity(compiled(x), oracle(x), model(x))


def test_count():
    sites = lorac.sites(nn.ModuleDict({"a": nn.Linear(7, 11), "b": nn.Conv2d(3, 8, 3), "c": nn.Embedding(13, 6)}))
    numel = {p: sum(math.prod(s.shape) for s in lorac.LoRA(r=4).params(site).values()) for p, site in sites.items()}
    assert numel == {"a": 4 * (7 + 11), "b": 4 * (3 * 3 * 3 + 8), "c": 4 * (13 + 6)}


@torch.no_grad()
@pytest.mark.parametrize("kind", [lorac.LoRA, lorac.DoRA], ids=lambda kind: kind.name)
def test_ids_are_not_dropped(kind):
    """An embedding's input is not numbers, so that dropout leaves it, as in PEFT."""
    host = nn.Sequential(nn.Embedding(9, 6))
    compiled = lorac.compile(host, {"a": kind(r=2, dropout=0.9, targets=["0"])})
    for parameter in (p for p in compiled.parameters() if p.requires_grad):
        parameter.add_(torch.linspace(0.1, 0.5, parameter.numel()).reshape(parameter.shape))
    ids = torch.tensor([[1, 8, 3], [0, 2, 2]])
    compiled.eval()
    expected = compiled(ids)
    compiled.train()
    assert_close(compiled(ids), expected)
    assert_apart(expected, host(ids))
