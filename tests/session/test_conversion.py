"""``lorac.convert``: the LoRA that an engine runs, read by the engine's own loader where its package is to be had."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import lorac
from campaigns.engines import checkers
from campaigns.engines.contribution import contributing
from lorac.formats.engines import ENGINES
from lorac.storage.onnx_adapter import read_onnx_adapter
from lorac.testing.parity import CONTRIBUTION, assert_close, assert_parity
from lorac.variants.base import Variant
from tests import image_files
from tests.diffusion import small_unet
from tests.refusing import refuses

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = torch.arange(3, 19)[None]
METHODS: dict[str, Variant] = {
    "lora": lorac.LoRA(r=3, alpha=5, targets=["k_proj", "up_proj", "lm_head", "embed_tokens"]),
    "patterns": lorac.LoRA(r=3, rslora=True, rank_pattern={"o_proj": 5}, targets=["q_proj", "o_proj"]),
    "dora": lorac.DoRA(r=2, targets=["v_proj", "down_proj"]),
    "ia3": lorac.IA3(targets=["k_proj"], feedforward=[]),
    "hra": lorac.HRA(r=4, targets=["q_proj", "gate_proj", "up_proj", "lm_head"]),
    "tokens": lorac.TrainableTokens(token_indices=(4, 9, 11), targets=["embed_tokens"]),
}


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()


@pytest.fixture(scope="module")
def mixture() -> nn.Module:
    torch.manual_seed(0)
    fields = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **fields)).eval()


def trained(model: nn.Module, variant: Variant) -> lorac.Adapter:
    """Return an adapter that contributes about a fifth of the base's output."""
    return contributing(model, variant, lambda call: call(input_ids=IDS).logits)[0]


def answer(model: Any, adapter: lorac.Adapter | None = None) -> Tensor:
    compiled = lorac.compile(model, {} if adapter is None else {"mine": adapter})
    with torch.no_grad():
        return compiled(input_ids=IDS, adapters=None if adapter is None else "mine").logits


def served(engine: str, folder: Path, model: nn.Module) -> Tensor:
    if checkers.find_package(engine) is None:
        pytest.skip(f"{engine} is not installed, nor unpacked in ${checkers.WHEELS}")
    with torch.no_grad():
        return checkers.apply(checkers.READERS[engine](folder, model), model)(IDS).logits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_is_served_equal_by_the_loader_of_the_engine(engine, method, llama, tmp_path):
    adapter = trained(llama, METHODS[method])

    made = lorac.convert(adapter, tmp_path / "out", for_=engine, model=llama, tolerance=0)

    base, given = answer(llama), answer(llama, adapter)
    assert_parity({"logits": answer(llama, made)}, {"logits": given}, {"logits": base})
    assert_parity({"logits": served(engine, tmp_path / "out", llama)}, {"logits": given}, {"logits": base})


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_experts_lie_apart_in_the_file(engine, mixture, tmp_path):
    adapter = trained(mixture, lorac.LoRA(r=3, targets=["v_proj"], parameters=["mlp.experts.gate_up_proj"]))

    lorac.convert(adapter, tmp_path / "out", for_=engine, model=mixture)

    keys = load_file(tmp_path / "out" / "adapter_model.safetensors")
    expert = "base_model.model.model.layers.1.mlp.experts.3."
    assert {f"{expert}{name}.lora_A.weight" for name in ("gate_proj", "up_proj", "down_proj")} <= keys.keys()
    assert not any(key.endswith("experts.lora_A.weight") for key in keys)
    found = served(engine, tmp_path / "out", mixture)
    assert_parity({"logits": found}, {"logits": answer(mixture, adapter)}, {"logits": answer(mixture)})


def test_experts_are_stacked_where_the_engine_stacks_them(tmp_path):
    fields = {"num_local_experts": 4, "head_dim": 8}
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES, **fields)).eval()
    adapter = trained(model, lorac.LoRA(r=2, targets=(), parameters=["mlp.experts.down_proj"]))

    lorac.convert(adapter, tmp_path / "out", for_="vllm", model=model)

    keys = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert keys["base_model.model.model.layers.0.mlp.experts.lora_A.weight"].shape == (8, 48)
    # vLLM asserts that both projections have factors.
    assert not keys["base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.weight"].any()


@pytest.mark.parametrize("engine", ["vllm", "sglang", "olive"])
def test_the_file_holds_no_bias_and_no_field_that_the_engine_leaves_out(engine, llama, tmp_path):
    rules = ENGINES[engine]
    adapter = trained(llama, lorac.IA3(targets=["k_proj", "down_proj"], feedforward=["down_proj"]))

    lorac.convert(adapter, tmp_path / "out", for_=engine, model=llama, rank=8)

    assert not any(key.endswith("bias") for key in load_file(tmp_path / "out" / "adapter_model.safetensors"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    unset = (None, False, True, "none", {}, [], 16)
    assert all(config.get(name) in unset for name in (*rules.refused, *rules.ignored))


def test_to_lora_makes_no_biases_of_zeros(llama):
    made = lorac.to_lora(trained(llama, lorac.IA3(targets=["k_proj"], feedforward=[])), llama, rank=4)

    assert not made.variant.settings["lora_bias"]
    assert all(at.keys() == {"lora_A", "lora_B"} for at in made.tensors.values())


def test_sglang_gets_one_rank_and_whole_groups(llama):
    made = lorac.convert(trained(llama, METHODS["patterns"]), for_="sglang", model=llama)

    leaves = {path.rpartition(".")[2] for path in made.tensors}
    assert leaves == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {at["lora_A"].shape[0] for at in made.tensors.values()} == {5}
    assert not made.variant.settings["rank_pattern"]


def test_sites_that_complete_a_group_count_in_the_hash_of_the_base(llama, tmp_path):
    lorac.save_adapter(trained(llama, lorac.LoRA(r=2, targets=["q_proj"])), tmp_path, model=llama)
    inputs = {"input_ids": torch.arange(24).reshape(2, 12)}

    made = lorac.convert(lorac.load_adapter(tmp_path, llama), for_="sglang", model=llama, rank=1, inputs=inputs)

    assert set(made.provenance["output_errors"]) == {"", *(p for p in made.sites if p.endswith("q_proj"))}
    lorac.compile(llama, {"made": made})


def test_replaced_head_becomes_a_lora_or_stays_whole_where_the_engine_takes_it(llama, tmp_path):
    fields = {**SIZES, "num_labels": 5, "pad_token_id": 0}
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**fields)).eval()
    adapter = trained(model, lorac.LoRA(r=2, targets=["q_proj"], modules_to_save=["score"]))

    lorac.convert(adapter, tmp_path / "out", for_="vllm", model=model)
    made = lorac.convert(
        trained(llama, lorac.LoRA(targets=["q_proj"], modules_to_save=["lm_head"])), for_="vllm", model=llama
    )

    keys = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert torch.equal(keys["base_model.model.score.weight"], adapter.replaced["score.weight"])
    assert made.tensors["lm_head"]["lora_A"].shape == (16, 32) and not made.replaced
    with pytest.raises(lorac.SiteError, match=r"SGLang .* cannot run adapter .* 'score', a layer that it does not"):
        lorac.convert(adapter, for_="sglang", model=model)


def test_rejects_by_site_and_writes_nothing(llama, tmp_path):
    adapter = trained(llama, lorac.LNTuning(targets=["input_layernorm"]))

    with pytest.raises(
        lorac.SiteError, match=r"at 2 sites: 'model.layers.0.input_layernorm.weight', a weight within"
    ) as caught:
        lorac.convert(adapter, tmp_path / "out", for_="vllm", model=llama)

    assert "lorac merge" in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("engine", ["vllm", "mlx"])
def test_rejects_a_model_of_which_the_engine_runs_no_adapters(engine):
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32)).eval()
    adapter = trained(model, lorac.LoRA(targets=["c_attn"]))

    with pytest.raises(lorac.SiteError, match="runs no adapters on a model of type 'gpt2'"):
        lorac.convert(adapter, for_=engine, model=model)


def test_tolerance_chooses_the_smallest_rank(llama):
    adapter = trained(llama, METHODS["dora"])

    made = lorac.convert(adapter, for_="vllm", model=llama, tolerance=0.3)

    for path, error in made.provenance["errors"].items():
        rank = made.tensors[path]["lora_A"].shape[0]
        less = lorac.convert(adapter, for_="vllm", model=llama, rank=rank - 1)
        assert error <= 0.3 < less.provenance["errors"][path]
    with pytest.raises(lorac.CompileError, match=r"more than tolerance=0\.01"):
        lorac.convert(adapter, for_="vllm", model=llama, rank=2, tolerance=0.01)
    with pytest.raises(lorac.OptionError, match="up to rank 512, not 600"):
        lorac.convert(adapter, for_="vllm", model=llama, rank=600)


def test_inputs_choose_the_pair_that_changes_their_outputs_least(llama):
    torch.manual_seed(2)
    wide = copy.deepcopy(llama)
    with torch.no_grad():  # features of unequal size, as trained models have
        wide.get_submodule("model.layers.0.input_layernorm").weight.mul_(torch.logspace(-1, 1, 32))
    adapter = trained(wide, lorac.DoRA(r=4, targets=["layers.0.self_attn.q_proj"]))

    plain = lorac.convert(adapter, for_="vllm", model=wide, rank=4)
    seen = lorac.convert(adapter, for_="vllm", model=wide, rank=4, inputs={"input_ids": IDS})

    base, given = answer(wide), answer(wide, adapter)
    errors = [float(torch.dist(answer(wide, made), given) / torch.dist(given, base)) for made in (plain, seen)]
    assert errors[1] < 0.9 * errors[0]
    assert_close(*map(torch.tensor, (seen.provenance["output_errors"][""], errors[1])))
    [site] = seen.tensors
    assert seen.provenance["output_errors"][site] < plain.provenance["errors"][site] <= seen.provenance["errors"][site]


def test_a_tolerance_is_that_of_the_outputs_where_inputs_are_given(llama):
    wide = copy.deepcopy(llama)
    with torch.no_grad():
        wide.get_submodule("model.layers.0.input_layernorm").weight.mul_(torch.logspace(-1, 1, 32))
    adapter = trained(wide, lorac.DoRA(r=4, targets=["layers.0.self_attn.q_proj"]))
    given: dict[str, Any] = {"for_": "vllm", "model": wide, "rank": 4, "inputs": {"input_ids": IDS}}
    seen = lorac.convert(adapter, **given)
    [site] = seen.tensors
    error = seen.provenance["output_errors"][site]
    assert error * 1.01 < seen.provenance["errors"][site]

    made = lorac.convert(adapter, **given, tolerance=error * 1.01)

    assert made.tensors[site]["lora_A"].shape[0] == 4
    with pytest.raises(lorac.CompileError, match="more than tolerance="):
        lorac.convert(adapter, **given, tolerance=error * 0.99)


def test_a_bias_at_one_site_gives_the_others_zeros(llama):
    adapter = trained(llama, lorac.LoRA(r=2, lora_bias=True, targets=["q_proj", "k_proj"]))
    for path, tensors in adapter.tensors.items():
        tensors["lora_bias"].data.mul_(path.endswith("layers.0.self_attn.q_proj"))

    made = lorac.convert(adapter, for_="diffusers", model=llama)

    assert all(tensors["lora_bias"].any() == ("layers.0.self_attn.q" in path) for path, tensors in made.tensors.items())
    assert_close(answer(llama, made), answer(llama, adapter))
    with pytest.raises(lorac.SiteError, match=r"at 1 sites: 'model.layers.0.self_attn.q_proj', its bias"):
        lorac.convert(adapter, for_="vllm", model=llama)


def test_names_the_inputs_of_genai_programs(llama, tmp_path):
    adapter = trained(llama, lorac.LoRA(r=2, targets=["q_proj", "down_proj"]))

    lorac.convert(adapter, tmp_path / "out.onnx_adapter", for_="genai", model=llama)

    with (tmp_path / "out.onnx_adapter").open("rb") as file:
        names = set(read_onnx_adapter(file, AssertionError))
    assert "model.layers.0.attn.q_proj.lora_A.MatMul.weight" in names
    assert "model.layers.1.mlp.down_proj.lora_B.MatMul.weight" in names


# ── diffusers ────────────────────────────────────────────────────────────────────────────────────────────────────────
def make_sd3() -> Any:
    import diffusers

    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        caption_projection_dim=16, joint_attention_dim=12, pooled_projection_dim=10, out_channels=4,
        pos_embed_max_size=8, dual_attention_layers=(0,),
    ).eval()  # fmt: skip


def call_sd3() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"hidden_states": (1, 4, 8, 8), "encoder_hidden_states": (1, 5, 12), "pooled_projections": (1, 10)}
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**drawn, "timestep": torch.tensor([400.0])}


@torch.no_grad()
def draw(model: Any, variant: Variant, call: Mapping[str, Tensor]) -> tuple[lorac.Adapter, Tensor]:
    """Return an adapter away from its start, and what the model computes with it."""
    compiled = lorac.compile(model, {"mine": variant})
    adapter, generator = compiled.adapters["mine"], torch.Generator().manual_seed(1)
    for tensor in adapter.parameters():
        tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    base, given = (compiled(**call, adapters=name, return_dict=False)[0] for name in (None, "mine"))
    assert torch.dist(base, given) > CONTRIBUTION[0] * base.norm()
    return adapter, given


IMAGES: dict[str, Any] = {
    "unet": (small_unet.small_unet, small_unet.inputs, ["to_q", "conv1", "conv_in", "time_emb_proj"]),
    "sd3": (make_sd3, call_sd3, ["to_q", "ff.net.2", "pos_embed.proj"]),
}
OF_IMAGES: dict[str, Variant] = {
    "lora": lorac.LoRA(r=3, alpha=5, rank_pattern={"to_q": 5}, alpha_pattern={"to_q": 2}),
    "biases": lorac.LoRA(r=2, alpha=3, rslora=True, lora_bias=True),
    "dora": lorac.DoRA(r=2, alpha=7),
    "oft": lorac.OFT(block_size=4),
}


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:peft.utils.warning.PeftWarning")
@pytest.mark.parametrize("method", OF_IMAGES)
@pytest.mark.parametrize("family", IMAGES)
def test_is_the_same_in_diffusers(family, method, tmp_path):
    make, call, targets = IMAGES[family]
    model, path = make(), tmp_path / "out.safetensors"
    adapter, given = draw(model, dataclasses.replace(OF_IMAGES[method], targets=targets), call())

    made = lorac.convert(adapter, path, for_="diffusers", model=model, tolerance=0)

    assert_close(checkers.run_diffusers(path, model, call()), given)
    assert ("conv_in" if family == "unet" else "pos_embed.proj") in made.tensors


def test_biases_of_layers_become_those_of_the_lora(tmp_path):
    model, path = make_sd3(), tmp_path / "out.safetensors"
    adapter, given = draw(model, lorac.LoRA(r=2, targets=["to_q"], bias="all"), call_sd3())

    lorac.convert(adapter, path, for_="diffusers", model=model)

    assert_close(checkers.run_diffusers(path, model, call_sd3()), given)


@torch.no_grad()
def test_pipelines_load_a_dora_of_two_models(tmp_path):
    from diffusers import StableDiffusionPipeline

    pair = image_files.make_pair()
    compiled = lorac.compile(pair, {"mine": lorac.DoRA(r=3, alpha=5, targets=["to_q", "conv1", "q_proj"])})
    for tensor in compiled.adapters["mine"].parameters():
        tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    expected = image_files.run_pair(compiled)

    lorac.convert(compiled.adapters["mine"], tmp_path / "out", for_="diffusers", model=pair, tolerance=0)

    parts = dict.fromkeys(("vae", "tokenizer", "scheduler", "safety_checker", "feature_extractor"))
    StableDiffusionPipeline(**parts, **pair, requires_safety_checker=False).load_lora_weights(tmp_path / "out")
    for found, given in zip(image_files.run_pair(pair), expected, strict=True):
        assert_close(found, given)


def make_video() -> Any:
    import diffusers

    return diffusers.UNet3DConditionModel(
        sample_size=8, block_out_channels=(4,), layers_per_block=1, norm_num_groups=2, cross_attention_dim=4,
        attention_head_dim=2, down_block_types=("DownBlock3D",), up_block_types=("UpBlock3D",),
    ).eval()  # fmt: skip


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.parametrize(
    "make, variant, why",
    [
        (small_unet.small_unet, lorac.LNTuning(targets=["norm1"]), r"'.*norm1.weight', a weight within '.*norm1'"),
        (small_unet.small_unet, lorac.LoRA(targets=["to_q"], bias="all"), r"'.*norm1.bias', a weight within"),
        (make_video, lorac.LoRA(targets=["conv_in"]), "'conv_in', in a UNet3DConditionModel, which has no load_lora"),
        (Depthwise, lorac.LoRA(r=2, targets=["conv"]), "'conv', a convolution of 4 groups"),
    ],
    ids=["norms", "biases of norms", "class without loader", "groups"],
)
def test_diffusers_has_no_place_for_it(make, variant, why, tmp_path):
    model = make()
    adapter = small_unet.noisy(lorac.compile(model, {"mine": variant}).adapters["mine"])

    with pytest.raises(lorac.SiteError, match=f"diffusers .* cannot run adapter .* sites: {why}"):
        lorac.convert(adapter, tmp_path / "out", for_="diffusers", model=model)

    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_keeps_invocation_tokens_where_the_engine_looks_for_them(llama: nn.Module, engine: str, tmp_path: Path) -> None:
    adapter = trained(llama, lorac.LoRA(r=3, targets=["q_proj", "k_proj", "v_proj"]))
    adapter.variant = dataclasses.replace(adapter.variant, invocation_tokens=(7, 8))
    lorac.save_adapter(adapter, tmp_path / "given", model=llama)
    if engine == "llama.cpp":
        lorac.convert(adapter, tmp_path / "made.gguf", for_=engine, model=llama)
        assert lorac.load_adapter(tmp_path / "made.gguf", llama).variant.invocation_tokens == (7, 8)
        assert not any("alora" in text for text in lorac.check(tmp_path / "given", llama, for_=engine).objections)
        return
    with refuses("not_mergeable", match="runs adapters on every token"):
        lorac.convert(adapter, for_=engine, model=llama)
    if ENGINES[engine].serves("llama"):
        objections = lorac.check(tmp_path / "given", llama, for_=engine).objections
        assert any("alora_invocation_tokens=[7, 8]" in text for text in objections)
