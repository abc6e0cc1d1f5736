"""Mixtures of experts: the products of their stacked weights, which kernels of their own take in eager."""

import dataclasses
import json

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations import use_experts_implementation
from transformers.pytorch_utils import Conv1D

import lorac
from lorac import load_adapter, save_adapter
from lorac.testing import adapter_away, assert_close, assert_parity
from tests.peft_files import change_tensors, load_peft, make_peft
from tests.refusing import refuses

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


@use_experts_implementation(is_transposed=True)
class TransposedExperts(nn.Module):
    """The same, each matrix stored as (in, out)."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = EXPERTS
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * INNER))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH))
        self.act_fn = nn.SiLU()


class Router(nn.Module):
    """What most of them have for a gate: a matrix of its own, in no layer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH))

    def forward(self, tokens):
        return nn.functional.linear(tokens, self.weight)


class Mixture(PreTrainedModel):
    """A layer and a router before experts, of which every token takes two, and a layer behind them."""

    config_class = MixtureConfig
    main_input_name = "x"

    def __init__(self, config, experts=Experts):
        super().__init__(config)
        self.front = nn.Linear(WIDTH, WIDTH)
        self.gate = Router()
        self.experts = experts(config)
        self.head = nn.Linear(WIDTH, 3)
        self.post_init()

    def forward(self, x):
        tokens = self.front(x).flatten(0, 1)
        weights, chosen = self.gate(tokens).softmax(-1).topk(2)
        return self.head(x + self.experts(tokens, chosen, weights).view_as(x))


def mixture(transposed=False):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = Mixture(MixtureConfig(), TransposedExperts if transposed else Experts).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
        return model, torch.randn(2, 7, WIDTH)


@pytest.mark.medium("the comparison with PEFT")
@pytest.mark.parametrize("mode", ["live", "fused"])
@torch.no_grad()
def test_experts_have_an_op_everywhere_and_the_host_keeps_its_own(mode):
    model, x = mixture()
    adapter = adapter_away(lorac.LoRA(r=2, targets=["front", "head"]), model, x, name="a", seed=0)
    eager = lorac.compile(model, {"a": adapter})
    compiled = lorac.compile(model, {"a": adapter}, target="onnxruntime", mode=mode, example_inputs=(x,))
    for inputs in (x, x[:1], torch.cat([x, 2 * x])):
        assert_parity(compiled(inputs), eager(inputs), model(inputs))
    assert model.config._experts_implementation == model.experts.config._experts_implementation == "grouped_mm"


TARGETS = {"target_modules": ["head"], "target_parameters": ["experts.gate_up_proj", "down_proj", "gate.weight"]}


CONFIG = LoraConfig(r=3, lora_alpha=5, rank_pattern={"down_proj": 2}, use_rslora=True, **TARGETS)


@pytest.mark.medium("the other layout", cases=["False"])
@pytest.mark.parametrize("transposed", [False, True])
@torch.no_grad()
def test_matches_peft(transposed, tmp_path):
    model, x = mixture(transposed)
    oracle = make_peft(model, tmp_path / "theirs", CONFIG, inputs={"x": x})
    base, more = model(x), torch.cat([x, 2 * x])
    for target, mode in (("eager", "live"), ("eager", "fused"), ("onnxruntime", "live"), ("onnxruntime", "fused")):
        compiled = lorac.compile(model, {"a": tmp_path / "theirs"}, target=target, mode=mode, example_inputs=(x,))
        before = compiled(x)
        assert_parity(before, oracle(x=x), base)
        assert_parity(compiled(more), oracle(x=more), model(more))
        compiled.swap(None)
        assert_close(compiled(x), base)
        compiled.swap("a")
        assert torch.equal(compiled(x), before)
        assert "its module reads in its own forward" in str(compiled.explain()) or mode == "fused"


class Layers(nn.Module):
    """Layers whose weights lie every way: (out, in), (in, out), an embedding's rows, an attention's packed matrix."""

    def __init__(self):
        super().__init__()
        self.embed, self.turned = nn.Embedding(11, WIDTH), Conv1D(WIDTH, WIDTH)
        self.attn, self.head = nn.MultiheadAttention(WIDTH, 2, batch_first=True), nn.Linear(WIDTH, 3)

    def forward(self, ids):
        x = self.turned(self.embed(ids))
        return self.head(self.attn(x, x, x, need_weights=False)[0])


@torch.no_grad()
def test_layers_adapted_by_their_weights_names(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model, ids = Layers().eval(), torch.randint(0, 11, (2, 5))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
    weights = ["embed.weight", "turned.weight", "attn.in_proj_weight", "head.weight"]
    config = LoraConfig(r=2, target_modules=[], target_parameters=weights)
    oracle = make_peft(model, tmp_path / "theirs", config, inputs={"ids": ids})
    read = load_adapter(tmp_path / "theirs", model)
    assert list(read.tensors) == ["embed", "turned", "attn", "head"]
    expected, base = oracle(ids=ids), model(ids)
    for mode in ("live", "fused"):
        assert_parity(lorac.compile(model, {"a": read}, mode=mode)(ids), expected, base)
    save_adapter(read, tmp_path / "ours", model=model)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["attn.in_proj_weight"]
    assert_parity(load_peft(model, tmp_path / "ours")(ids=ids), expected, base)


@torch.no_grad()
def test_round_trips_through_peft(tmp_path):
    model, x = mixture()
    oracle = make_peft(model, tmp_path / "theirs", CONFIG, inputs={"x": x})
    read = load_adapter(tmp_path / "theirs", model)
    assert read.tensors["experts.down_proj"]["lora_A"].shape == (EXPERTS, 2, INNER)
    save_adapter(read, tmp_path / "ours", model=model)
    assert torch.equal(load_peft(model, tmp_path / "ours")(x=x), oracle(x=x))
    only = {path: tensors for path, tensors in read.tensors.items() if path.startswith("experts.")}
    save_adapter(lorac.Adapter("a", read.variant, only), tmp_path / "one", model=model)
    expected = lorac.compile(model, {"a": load_adapter(tmp_path / "one", model)})(x)
    assert_parity(expected, load_peft(model, tmp_path / "one")(x=x), model(x))
    save_adapter(read, tmp_path / "native", format="native")
    assert_parity(lorac.compile(model, {"a": tmp_path / "native"})(x), oracle(x=x), model(x))


@pytest.mark.medium("the comparison with PEFT, and training of plain layers")
def test_experts_train_and_mix(tmp_path):
    model, x = mixture()
    fresh = lorac.LoRA(r=2, targets=(), parameters=("gate_up_proj", "down_proj", "gate.weight"))
    a, b = (adapter_away(fresh, model, x, name=name, seed=seed) for seed, name in enumerate("ab"))
    compiled = lorac.compile(model, {"a": a, "b": b}, active={"a": 0.5, "b": 0.7})
    with torch.no_grad():
        expected = compiled(x)
        emitted = lorac.compile(
            model, {"a": a, "b": b}, active={"a": 0.5, "b": 0.7}, target="onnxruntime", example_inputs=(x,)
        )
        assert_parity(emitted(x), expected, model(x))
        emitted.save(tmp_path / "artifact")
        loaded = lorac.load(tmp_path / "artifact")
        assert torch.equal(loaded(x), emitted(x))
    compiled.train()
    compiled(x).square().sum().backward()
    for name, parameter in compiled.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None and bool(parameter.grad.any())), name


def test_rejects_adapters_that_experts_do_not_admit(tmp_path):
    model, x = mixture()
    make_peft(model, tmp_path / "theirs", CONFIG, inputs={"x": x})
    with pytest.raises(lorac.BaseNeeded, match="target_parameters"):
        load_adapter(tmp_path / "theirs")
    with refuses("site_unsupported", match=r"dora adapts .* 'gate\.weight' is a matrix"):
        lorac.compile(model, {"a": lorac.DoRA(targets=(), parameters=("gate.weight",))})
    with refuses("site_unsupported", match=r"has a bias for 'gate\.weight'"):
        lorac.compile(model, {"a": lorac.LoRA(lora_bias=True, targets=(), parameters=("gate.weight",))})
    with refuses("site_not_found", match=r"'weight', which matches no site(.|\n)*such as stacked experts, in param"):
        lorac.compile(model, {"a": lorac.LoRA(targets=("weight",))})
    with refuses("site_not_found", match="targets 'gate_weight', which matches no site"):
        lorac.compile(model, {"a": lorac.LoRA(targets=(), parameters=("gate_weight",))})
    read = load_adapter(tmp_path / "theirs", model)
    dropping = lorac.Adapter("a", dataclasses.replace(read.variant, dropout=0.1), read.tensors)
    with refuses("unsupported_field", match=r"PEFT has no dropout at 'gate\.weight'"):
        save_adapter(dropping, tmp_path / "x", model=model)
    change_tensors(tmp_path / "theirs", {"model.experts.lora_A.weight": torch.zeros(5, INNER)})
    with refuses("shape_mismatch", match="of 3 matrices 4 -> 8"):
        load_adapter(tmp_path / "theirs", model)
