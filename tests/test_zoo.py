"""The test models themselves: all build, run, and can be adapted by PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from tests.parity import CONTRIBUTION, contribution
from tests.peft_files import WEIGHTS, make_peft
from tests.zoo import ZOO, fingerprint, tokenizer


@pytest.mark.medium("plain convolutions and a tiny BERT", keep=["plain_conv", "tiny_llama", "tiny_bert"])
@pytest.mark.slow("ten smaller models", cases=["smollm2"])
@pytest.mark.parametrize("name", ZOO)
def test_model_takes_a_peft_adapter_and_is_left_alone(name: str, tmp_path: Path) -> None:
    entry = ZOO[name]
    model, before = entry.model(), fingerprint(entry.model())
    inputs = entry.inputs(seed=1)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=list(entry.targets))
    oracle = make_peft(model, tmp_path, config, inputs=inputs, outputs=entry.outputs, dtype=torch.bfloat16)
    with torch.no_grad():
        shares = contribution(oracle(**inputs), model(**inputs), entry.outputs)
    assert all(CONTRIBUTION[0] <= share <= CONTRIBUTION[1] for share in shares.values())
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {torch.bfloat16}
    assert fingerprint(model) == before


def test_seeds_give_other_tensors(tmp_path: Path) -> None:
    entry = ZOO["plain_mlp"]
    config = LoraConfig(r=3, target_modules=["up", "head"])
    for seed in (0, 1):
        make_peft(entry.model(), tmp_path / str(seed), config, inputs=entry.inputs(), seed=seed)
    first, second = (load_file(tmp_path / str(seed) / WEIGHTS) for seed in (0, 1))
    assert first.keys() == second.keys()
    assert not any(torch.equal(first[key], second[key]) for key in first)


def test_fingerprint_detects_changes_of_a_model() -> None:
    model = ZOO["plain_mlp"].fresh()
    marks = [fingerprint(model)]
    with torch.no_grad():
        next(model.parameters()).add_(1)
    marks.append(fingerprint(model))
    model.train()
    marks.append(fingerprint(model))
    model.requires_grad_(False)
    marks.append(fingerprint(model))
    model.register_forward_hook(lambda *_: None)
    marks.append(fingerprint(model))
    assert len(set(marks)) == len(marks)


@pytest.mark.medium("test_model_takes_a_peft_adapter_and_is_left_alone, and generation of tiny models")
def test_smollm2_answers() -> None:
    model, words = ZOO["smollm2"].model(), tokenizer("smollm2")
    assert not hasattr(model.config, "quantization_config")
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = words.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "Paris" in words.decode(answer[0, inputs["input_ids"].shape[1] :])
