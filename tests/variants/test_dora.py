"""DoRA by hand, and against PEFT."""

import math

import pytest
import torch
from peft import LoraConfig
from torch import nn

import lorac
from lorac.testing import assert_close
from tests import parity, peft_files


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("mode", ["live", "fused", "baked"])
@torch.no_grad()
def test_worked_example(mode):
    model = nn.Sequential()
    model.add_module("site", nn.Linear(2, 2, bias=False, dtype=torch.float64))
    model.site.weight.data = tensor([[1.0, 2.0], [3.0, 4.0]])
    tensors = {
        "lora_A": tensor([[1.0, -1.0]]),
        "lora_B": tensor([[0.5], [2.0]]),
        "magnitude": tensor([math.sqrt(5), 5.0]),
    }
    adapter = lorac.Adapter("a", lorac.DoRA(r=1, alpha=2, targets=("site",)), {"site": tensors})

    answer = lorac.compile(model, {"a": adapter}, mode=mode)(tensor([[1.0, 2.0]]))

    assert_close(answer, tensor([[4.0, 5.0]]))


@torch.no_grad()
def test_worked_norms_and_weight():
    """W + s·B·A = [[2, 1], [7, 0]], its rows of length n = [√5, 7]: m/n = [1, 5/7], W' = [[2, 1], [5, 0]]."""
    model = nn.Sequential()
    model.add_module("site", nn.Linear(2, 2, bias=False, dtype=torch.float64))
    model.site.weight.data = tensor([[1.0, 2.0], [3.0, 4.0]])
    tensors = {"lora_A": tensor([[1.0, -1.0]]), "lora_B": tensor([[0.5], [2.0]])}
    tensors["magnitude"] = tensor([math.sqrt(5), 5.0])
    adapter = lorac.Adapter("a", lorac.DoRA(r=1, alpha=2, targets=("site",)), {"site": tensors})
    c = lorac.compile(model, {"a": adapter}).pool["a"].changes["site"].scales["c"]
    assert_close(c, tensor([1.0, 5 / 7]))
    baked = lorac.compile(model, {"a": adapter}, mode="baked").host.site.weight
    assert_close(baked, tensor([[2.0, 1.0], [5.0, 0.0]]))


def test_the_norm_is_a_constant_in_backward():
    """dL/dB = s·(m/n)∘(dL/dW')·Aᵀ, without the term that the norm's own derivative would add."""
    model = nn.Sequential()
    model.add_module("site", nn.Linear(4, 3, dtype=torch.float64))
    compiled = lorac.compile(model, {"a": lorac.DoRA(r=2, alpha=3, targets=("site",))})
    p = compiled.adapters["a"].tensors["site"]
    with torch.no_grad():
        p["lora_B"].normal_()
        p["magnitude"].mul_(1.3)
    x, upstream = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)

    compiled(x).backward(upstream)

    scaled = (p["magnitude"] / (model.site.weight + 1.5 * p["lora_B"] @ p["lora_A"]).norm(dim=1))[:, None]
    expected = 1.5 * scaled * (upstream.t() @ x) @ p["lora_A"].t()
    assert_close(p["lora_B"].grad, expected.detach())


class Host(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.conv, self.site = nn.Embedding(13, 6), nn.Conv2d(1, 4, 3, stride=2), nn.Linear(16, 5)

    def forward(self, ids):
        h = self.conv(self.embed(ids)[:, None])
        return self.site(h.flatten(1))


@pytest.mark.medium("a convolution", keep=["conv"])
@pytest.mark.parametrize("target", ["embed", "conv", "site"])
@torch.no_grad()
def test_peft(tmp_path, target):
    model, ids = Host().double().eval(), torch.randint(13, (3, 6))
    config = LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=[target])
    oracle = peft_files.make_peft(model, tmp_path, config, inputs={"ids": ids})
    for mode in ("live", "fused", "baked"):
        parity.assert_parity(lorac.compile(model, [tmp_path], mode=mode)(ids), oracle(ids), model(ids))
