"""``lorac.check`` says of an adapter what ``lorac.compile`` does with it, and everything that does not fit."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from torch import nn

import lorac


def tiny_llama(**fields) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**{**sizes, "num_attention_heads": 2, **fields})
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_llama()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    """A LoRA that PEFT wrote, and the same that lorac wrote with a hash of its base."""
    folder = tmp_path_factory.mktemp("adapters")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(folder / "lora")
    lorac.save_adapter(lorac.load_adapter(folder / "lora", model), folder / "hashed", model=model)
    return folder


def test_accepts_an_adapter_of_the_model(model, folder):
    found = lorac.check(folder / "lora", model)
    assert (found.fits, found.faults, found.repairs) == (True, (), ())
    assert found.facts["method"] == "lora at 4 sites"
    assert "the file recorded no hash" in found.facts["base weights"]
    assert lorac.check(folder / "hashed", model).facts["base weights"] == "equal, by the hash that the file recorded"
    half = lorac.check(folder / "hashed", copy.deepcopy(model).bfloat16())
    assert half.fits
    assert half.facts["base weights"].startswith("not compared: the model is quantised, or narrower")


def test_accepts_an_adapter_in_memory(model, folder):
    assert lorac.check(lorac.load_adapter(folder / "lora"), model).fits
    assert "no model is given" in lorac.check(folder / "lora").facts["base weights"]


def test_rejects_other_base_weights(folder):
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.add_(1.0)
    found = lorac.check(folder / "hashed", other)
    assert not found.fits
    assert "made for other base weights" in found.faults[0]
    assert lorac.check(folder / "lora", other).fits


def test_lists_every_fault(folder):
    wide = lorac.check(folder / "hashed", tiny_llama(hidden_size=24))
    assert not wide.fits
    assert len(wide.faults) == len({*wide.faults}) == 5
    assert sum("has shape" in fault for fault in wide.faults) == 4
    assert "other base weights" in wide.faults[-1]
    short = lorac.check(folder / "lora", tiny_llama(num_hidden_layers=1))
    assert [fault for fault in short.faults if "which is not a module of the model" in fault] == [*short.faults]
    assert len(short.faults) == 2


def test_repeats_the_error_of_compile_first(folder):
    other = tiny_llama(hidden_size=24)
    with pytest.raises(lorac.LoracError) as raised:
        lorac.compile(other, [folder / "lora"])
    found = lorac.check(folder / "lora", other)
    assert found.faults[0] == raised.value.what
    assert found.repairs == (raised.value.next_step,)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_names_tied_weights_of_which_one_is_changed(tmp_path):
    tied = tiny_llama(tie_word_embeddings=True)
    config = peft.LoraConfig(target_modules=["embed_tokens"], r=2, init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(tied), config).save_pretrained(tmp_path / "lora")
    assert lorac.check(tmp_path / "lora", tied).facts["tied weights"] == "'model.embed_tokens' alone, not lm_head"


def test_compares_the_vocabulary_of_a_tokenizer_in_the_folder(model, folder, tmp_path):
    tokens = {f"t{number}": number for number in range(40)}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(tokens, "t0")))
    for file in (folder / "lora").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert "vocabulary" not in lorac.check(tmp_path, model).facts
    tokenizer.save_pretrained(tmp_path)
    found = lorac.check(tmp_path, model)
    assert found.fits
    assert "has 40 tokens, the model 32: call model.resize_token_embeddings(40)" in found.facts["vocabulary"]


def test_reads_nothing_that_is_not_there(model, tmp_path):
    found = lorac.check(tmp_path / "none", model)
    assert (found.fits, len(found.faults)) == (False, 1)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert not lorac.check(tmp_path, model).fits
    with pytest.raises(lorac.WrongType):
        lorac.check(3, model)
    with pytest.raises(lorac.CompileError):
        lorac.check(tmp_path, "base")


def save_lora(model, folder, **fields) -> Path:
    config = peft.LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "r": 2, "init_lora_weights": False, **fields})
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("engine", "fields", "words"),
    [
        ("vllm", {}, None),
        ("vllm", {"use_dora": True}, "refuses use_dora=True"),
        ("vllm", {"modules_to_save": ["lm_head"]}, "refuses modules_to_save=['lm_head']"),
        ("vllm", {"trainable_token_indices": [1, 2]}, "ignores trainable_token_indices"),
        ("vllm", {"init_lora_weights": "pissa"}, "refuses init_lora_weights='pissa'"),
        ("vllm", {"init_lora_weights": "gaussian"}, None),
        ("vllm", {"rank_pattern": {"v_proj": 3}, "use_rslora": True}, None),
        ("sglang", {"use_rslora": True}, "ignores use_rslora=True"),
        ("sglang", {"use_dora": True}, "refuses use_dora=True"),
        ("olive", {"rank_pattern": {"v_proj": 3}}, "ignores rank_pattern"),
        ("olive", {"rank_pattern": {"v_proj": 3}}, "one rank and one scale for all layers"),
        ("llama.cpp", {"use_rslora": True}, "ignores use_rslora=True"),
        ("llama.cpp", {}, "reads files of the format 'gguf', and this is of 'peft'"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_lists_objections_of_an_engine(model, tmp_path, engine, fields, words):
    found = lorac.check(save_lora(model, tmp_path / "lora", **fields), model, for_=engine)
    assert found.fits
    if words is None:
        assert (found.objections, found.repairs) == ((), ())
        return
    assert any(words in text for text in found.objections)
    assert found.repairs[0].startswith(f"`lorac convert ADAPTER OUT --for {engine} --model MODEL`")


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_compares_sites_and_models_with_an_engine(model, tmp_path):
    head = save_lora(model, tmp_path / "head", target_modules=["lm_head", "q_proj"])
    assert any(
        "takes no LoRA of 'model.layers.0" in text for text in lorac.check(head, model, for_="sglang").objections
    )
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    other = transformers.GPT2LMHeadModel(config).eval()
    gpt = save_lora(other, tmp_path / "gpt", target_modules=["c_attn"], fan_in_fan_out=True)
    assert any("models of type 'gpt2'" in text for text in lorac.check(gpt, other, for_="vllm").objections)
    assert lorac.check(gpt, other).fits
    large = save_lora(model, tmp_path / "large", r=600)
    assert any(
        "ranks up to 512, and this has 600" in text for text in lorac.check(large, model, for_="vllm").objections
    )
    doubles = lorac.load_adapter(save_lora(model, tmp_path / "doubles")).to(torch.float64)
    assert any("tensors of float64" in text for text in lorac.check(doubles, model, for_="vllm").objections)


def test_compares_other_methods_with_an_engine(model, tmp_path):
    config = peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[])
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path)
    assert any("runs LoRAs, and this is ia3" in text for text in lorac.check(tmp_path, for_="vllm").objections)
    with pytest.raises(lorac.OptionError, match="there is no engine"):
        lorac.check(tmp_path, for_="vlm")
