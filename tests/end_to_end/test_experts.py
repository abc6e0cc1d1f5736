"""Mixtures of experts: the products of their stacked weights, which kernels of their own take in eager."""

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations import use_experts_implementation

import lorac
from lorac.testing import adapter_away, parity

WIDTH, INNER, EXPERTS = 8, 4, 3  # what a row takes is a multiple of 16 bytes: torch's own kernel asks for it


class MixtureConfig(PretrainedConfig):
    """Of a mixture without a vocabulary."""

    model_type = "mixture"


@use_experts_implementation
class Experts(nn.Module):
    """Experts as transformers stacks them: gate and up as one, (E, 2·inner, width), and down (E, width, inner)."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = EXPERTS
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, WIDTH))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER))
        self.act_fn = nn.SiLU()


class Mixture(PreTrainedModel):
    """A router before experts, of which every token takes two, and a layer behind them."""

    config_class = MixtureConfig
    main_input_name = "x"

    def __init__(self, config):
        super().__init__(config)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = Experts(config)
        self.head = nn.Linear(WIDTH, 3)
        self.post_init()

    def forward(self, x):
        tokens = x.flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(-1).topk(2)
        return self.head(x + self.experts(tokens, chosen, weights).view_as(x))


def mixture():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = Mixture(MixtureConfig()).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
        return model, torch.randn(2, 7, WIDTH)


@pytest.mark.parametrize("mode", ["live", "fused"])
@torch.no_grad()
def test_experts_have_an_op_everywhere_and_the_host_keeps_its_own(mode):
    model, x = mixture()
    adapter = adapter_away(lorac.LoRA(r=2, targets=["router", "head"]), model, x, name="a", seed=0)
    eager = lorac.compile(model, {"a": adapter})
    compiled = lorac.compile(model, {"a": adapter}, target="onnxruntime", mode=mode, example_inputs=(x,))
    for inputs in (x, x[:1], torch.cat([x, 2 * x])):
        parity.assert_parity(compiled(inputs), eager(inputs), model(inputs))
    assert model.config._experts_implementation == model.experts.config._experts_implementation == "grouped_mm"
