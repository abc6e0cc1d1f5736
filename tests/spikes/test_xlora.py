"""Spike: X-LoRA (arXiv 2402.07148). A pass of the unadapted model gives the gates of every layer in the second."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import lorac
from lorac.variants import _inits
from lorac.variants.params import ParamSpec
from tests.parity import assert_parity
from tests.variants.away import away

D, N, R = 6, 3, 2


@dataclass(frozen=True, kw_only=True)
class XLoRA(lorac.BranchVariant):
    name, paper = "spike-xlora", "arXiv 2402.07148"

    def reads(self, site):
        return ("base:blocks.1",)

    def params(self, site):
        return {
            "classifier": ParamSpec((N, D), _inits.kaiming_uniform, shared=True),
            "lora_A": ParamSpec((N * R, site.in_features), _inits.kaiming_uniform),
            "lora_B": ParamSpec((site.out_features, N * R), _inits.zeros),
        }

    def branch(self, x, y, p, ctx):
        gates = F.linear(ctx.value("base:blocks.1"), p.classifier).softmax(-1)
        return y + F.linear(F.linear(x, p.lora_A) * gates.repeat_interleave(R, dim=-1), p.lora_B)


class Host(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.Tanh()) for _ in "ab")

    def forward(self, x):
        return self.blocks[1](self.blocks[0](x))


def test_a_base_pass_gates_every_layer():
    host, x = Host().eval(), torch.randn(3, 5, D)
    adapter = away(XLoRA(), host, (x,), "x")
    compiled = lorac.compile(host, {"x": adapter})
    base, y = host(x).detach(), x  # by hand: the base pass is the host itself
    for i in range(2):
        p = adapter.tensors[f"blocks.{i}.0"]
        gates = (base @ p["classifier"].T).softmax(-1).repeat_interleave(R, dim=-1)
        y = torch.tanh(host.blocks[i][0](y) + (y @ p["lora_A"].T * gates) @ p["lora_B"].T)
    assert_parity(compiled(x), y, base)
    emitted = lorac.compile(host, {"x": adapter}, target="onnxruntime", example_inputs=(x,))
    assert_parity(emitted(x), y, base, own_base=emitted(x, adapters=None))
    compiled(x).sum().backward()  # the first pass is a constant, the classifier trains through the second
    assert compiled.adapters["x"].tensors["blocks.0.0"]["classifier"].grad.any()
