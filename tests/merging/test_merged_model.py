"""``merge_into``: the model's own class, whose weights have the adapters in them."""

import pytest
import torch
from peft import IA3Config, LoraConfig
from torch import nn

import lorac
from tests.parity import assert_parity
from tests.peft_files import make_peft, quiet
from tests.refusing import refuses
from tests.zoo import ZOO

EVERYTHING = {
    "LoRA on all": LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules="all-linear"),
    "DoRA": LoraConfig(r=3, use_dora=True, target_modules=["q_proj", "down_proj"]),
    "saved modules": LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["norm", "lm_head"]),
    "IA3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


def saved(model, folder):
    """What transformers reads of a model that it wrote in several files."""
    model.save_pretrained(folder, max_shard_size="40KB")
    return type(model).from_pretrained(folder).eval()


@torch.no_grad()
def drawn(model, methods, size):
    """The model compiled with adapters away from their first values."""
    compiled = lorac.compile(model, methods)
    for adapter in compiled.adapters.values():
        for tensor in adapter.parameters():
            if tensor.is_floating_point():
                tensor.add_(size * torch.randn_like(tensor))
    return compiled


@pytest.mark.medium("other methods; LoRA, and test_merged_checkpoint.py", cases=["DoRA", "IA3"])
@torch.no_grad()
@pytest.mark.parametrize("config", EVERYTHING.values(), ids=EVERYTHING)
def test_matches_pefts_merged_model(config, tmp_path):
    entry = ZOO["tiny_llama"]
    model, inputs = entry.model(), entry.inputs()
    oracle = make_peft(model, tmp_path / "a", config, inputs=inputs, outputs=entry.outputs)
    merged = lorac.merge_into(model, tmp_path / "a")
    assert type(merged) is type(model) and not merged.training
    found = saved(merged, tmp_path / "merged")(**inputs).logits
    assert torch.equal(found, merged(**inputs).logits)
    assert torch.equal(lorac.merge_into(oracle)(**inputs).logits, found)
    with quiet():
        expected = oracle.merge_and_unload()(**inputs).logits
    assert_parity(found, expected, model(**inputs).logits)


@torch.no_grad()
def test_every_merged_value_is_as_near_as_its_dtype_allows(tmp_path):
    """Of W + s·B·A in float64: within r + 2 roundings of its terms, and as near as PEFT's, which is rounded too."""
    entry = ZOO["tiny_llama"]
    model = entry.model()
    config = LoraConfig(
        r=3, lora_alpha=5, use_rslora=True, target_modules="all-linear", modules_to_save=["norm", "lm_head"]
    )
    oracle = make_peft(model, tmp_path / "a", config, inputs=entry.inputs(), outputs=entry.outputs)
    merged, adapter = lorac.merge_into(model, tmp_path / "a"), lorac.load_adapter(tmp_path / "a", model)
    with quiet():
        theirs = dict(oracle.merge_and_unload().named_parameters())
    distances, most = [0.0, 0.0], torch.finfo(torch.float32).eps / 2 * (3 + 2)
    for name, tensor in merged.named_parameters():
        at = adapter.tensors.get(name.removesuffix(".weight"))
        if at is None:
            assert torch.equal(tensor, theirs[name])
            continue
        base, down, up = (one.double() for one in (model.get_parameter(name), at["lora_A"], at["lora_B"]))
        scale = 5 / 3**0.5
        exact, terms = base + scale * up @ down, base.abs() + scale * up.abs() @ down.abs()
        assert ((tensor - exact).abs() <= most * terms).all(), name
        for number, one in enumerate((tensor, theirs[name])):
            distances[number] += float((one - exact).square().sum())
    own, other = (distance**0.5 for distance in distances)
    print(f"to float64: lorac {own:.3e}, PEFT {other:.3e}")
    assert round(own / other, 2) <= 1


@pytest.mark.medium("GPT-2", keep=["tiny_gpt2"])
@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny_gpt2", "tiny_bert", "tiny_vit", "tiny_t5"])
def test_models_of_every_kind_load_again(name, tmp_path):
    entry = ZOO[name]
    model, inputs = entry.model(), entry.inputs()
    config = LoraConfig(r=2, target_modules=list(entry.targets), bias="lora_only")
    make_peft(model, tmp_path / "a", config, inputs=inputs, outputs=entry.outputs)
    live = lorac.compile(model, {"a": tmp_path / "a"})
    merged = saved(lorac.merge_into(model, {"a": tmp_path / "a"}), tmp_path / "merged")
    assert_parity(merged(**inputs), live(**inputs), model(**inputs), names=entry.outputs)


@torch.no_grad()
@pytest.mark.parametrize("path", ["transformer.wte", "lm_head"])
def test_tied_weights_are_untied_with_a_word(path, tmp_path):
    model, inputs = ZOO["tiny_gpt2"].model(), ZOO["tiny_gpt2"].inputs()
    compiled = drawn(model, lorac.LoRA(r=2, targets=[path]), 0.02)
    with pytest.warns(lorac.LoracWarning, match=f"one tensor, and are several now.*'{path}.weight' alone"):
        merged = lorac.merge_into(model, compiled.adapters)
    again = saved(merged, tmp_path)
    assert not again.config.tie_word_embeddings and model.config.tie_word_embeddings
    assert_parity(again(**inputs).logits, compiled(**inputs).logits, model(**inputs).logits)


@torch.no_grad()
def test_ties_stay_where_the_model_computes_by_them(tmp_path):
    """T5 scales what its tied head reads; its configuration must not say that it is another model."""
    model, inputs = ZOO["tiny_t5"].model(), ZOO["tiny_t5"].inputs()
    compiled = drawn(model, lorac.LoRA(r=2, targets=["lm_head"]), 0.2)
    with pytest.warns(lorac.LoracWarning, match="'lm_head.weight' alone"):
        merged = lorac.merge_into(model, compiled.adapters)
    assert_parity(saved(merged, tmp_path)(**inputs).logits, compiled(**inputs).logits, model(**inputs).logits)


def test_weights_stay_tied_where_the_same_is_merged_into_both():
    model = ZOO["tiny_gpt2"].model()
    new = torch.randn_like(model.lm_head.weight)
    names = ("transformer.wte.weight", "lm_head.weight")
    merged = lorac.merge_into(model, lorac.Adapter("a", lorac.LoRA(), replaced=dict.fromkeys(names, new)))
    assert merged.lm_head.weight is merged.transformer.wte.weight and merged.config.tie_word_embeddings
    assert torch.equal(merged.lm_head.weight, new)


@torch.no_grad()
def test_leaves_the_given_model_unchanged():
    model = ZOO["tiny_llama"].fresh()
    model.lm_head.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compiled = drawn(model, lorac.LoRA(r=1, targets=["q_proj"]), 0.1)
    merged = lorac.merge_into(model, compiled.adapters)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [p.requires_grad for p in merged.parameters()] == [p.requires_grad for p in model.parameters()]
    one, other = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight")
    assert merged.get_parameter(one).data_ptr() != model.get_parameter(one).data_ptr()
    assert merged.get_parameter(other).data_ptr() == model.get_parameter(other).data_ptr(), "memory is shared"


@pytest.mark.medium("the other dtype", cases=["dtype1"])
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    """Sparse, low-rank and replaced, alone and mixed: each value is the nearest to that in float32."""
    layer = nn.Sequential(nn.Linear(32, 24)).to(dtype)
    methods = [lorac.SHiRA(r=2, targets=["0"]), lorac.LoRA(r=3, targets=["0"]), lorac.DoRA(r=3, targets=["0"])]
    compiled = drawn(layer, methods, 0.1)
    wide = nn.Sequential(nn.Linear(32, 24))
    wide.load_state_dict(layer.state_dict())
    for choice in ("shira", "lora", {"shira": 0.3, "lora": -1.0, "dora": 0.5}):
        found = lorac.merge_into(layer, compiled.adapters, choice)[0].weight
        expected = lorac.merge_into(wide, compiled.adapters, choice)[0].weight
        assert found.dtype is dtype
        assert torch.equal(found, expected.to(dtype))


@torch.no_grad()
def test_several_models_are_merged_by_name():
    models = {"unet": nn.Sequential(nn.Linear(4, 6)), "text": nn.Sequential(nn.Linear(3, 5))}
    compiled = drawn(models, lorac.LoRA(r=1, targets=["0"]), 0.1)
    merged = lorac.merge_into(models, compiled.adapters)
    assert list(merged) == ["unet", "text"]
    x = torch.randn(2, 3)
    assert_parity(merged["text"](x), compiled["text"](x), models["text"](x))


def test_a_module_under_two_names_becomes_two():
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": layer, "other": layer})
    adapter = lorac.Adapter("a", lorac.LoRA(), replaced={"one.bias": torch.ones(4)})
    with pytest.warns(lorac.LoracWarning, match=r"'one.bias' alone"):
        merged = lorac.merge_into(model, adapter)
    assert torch.equal(merged["one"].bias, torch.ones(4)) and torch.equal(merged["other"].bias, layer.bias)


def adapter_for(model, method):
    return lorac.compile(model, {"a": method}).adapters["a"]


def test_rejects_sites_that_cannot_be_merged_by_name():
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Conv2d(4, 4, 1, groups=2))
    with refuses("not_mergeable", match=r"'a' \(x.*\).*'0'.*\n.*freeze_router|'a' \(meteora\)"):
        lorac.merge_into(model, adapter_for(model, lorac.MeteoRA(targets=["0"])))
    with refuses("not_mergeable", match=r"'0' it needs a bias, which the layer lacks"):
        lorac.merge_into(model, drawn(model, lorac.LoRA(r=1, lora_bias=True, targets=["0"]), 0.1).adapters)
    grouped = adapter_for(model, lorac.LoRA(r=1, targets=["1"]))
    with torch.no_grad():
        grouped.tensors["1"]["lora_B"].add_(1)
    with refuses("not_mergeable", match=r"'1' it leaves the blocks of a grouped convolution"):
        lorac.merge_into(model, grouped)
    normed = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)))
    with refuses("not_mergeable", match="computed at each call"):
        lorac.merge_into(normed, adapter_for(normed, lorac.LoRA(r=1, targets=["0"])))


def test_rejects_arguments_that_choose_nothing():
    model = nn.Sequential(nn.Linear(6, 4))
    one, other = (lorac.compile(model, {n: lorac.LoRA(r=1, targets=["0"])}).adapters[n] for n in "ab")
    with refuses("choice_error", match=r"adapters a, b\n.*active="):
        lorac.merge_into(model, [one, other])
    with refuses("choice_error", match="nothing is merged"):
        lorac.merge_into(model)
    with refuses("choice_error", match="nothing is merged"):
        lorac.merge_into(model, one, {"a": 0})
    with refuses("adapter_exists"):
        lorac.merge_into(model, [one, one], "a")
    with refuses("choice_error", match="no component 'unet'"):
        lorac.merge_into(model, {"a": {"unet": one}})
    with refuses("adapter_error", match="without trained tensors"):
        lorac.merge_into(model, lorac.LoRA(r=1))
    with refuses("site_unsupported"):
        lorac.merge_into(nn.Sequential(nn.ReLU(), nn.Linear(6, 4)), one)
    with refuses("shape_mismatch"):
        lorac.merge_into(nn.Sequential(nn.Linear(6, 5)), one)
    with refuses("choice_error", match="cannot be truncated"):
        lorac.merge_into(model, one, {"a": lorac.Active(1.0, rank=1)})


def test_rejects_values_that_float16_cannot_hold():
    model = nn.Sequential(nn.Linear(6, 4)).half()
    adapter = adapter_for(model, lorac.LoRA(r=1, targets=["0"]))
    with torch.no_grad():
        adapter.tensors["0"]["lora_A"].fill_(1e3)
        adapter.tensors["0"]["lora_B"].fill_(1e3)
    with refuses("non_finite", match="'0.weight' is NaN, or larger than float16"):
        lorac.merge_into(model, adapter)
