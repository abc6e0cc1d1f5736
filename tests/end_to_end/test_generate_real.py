"""SmolLM2 with adapters of PEFT's goes on with real prompts as PEFT has it, over a cache in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftConfig, ShiraConfig

import lorac
from tests import peft_files
from tests.limits import assert_same_text
from tests.zoo import ZOO, tokenizers

TARGETS = ["q_proj", "v_proj", "down_proj"]
CONFIGS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=8, target_modules=TARGETS),
    "dora": LoraConfig(r=8, target_modules=TARGETS, use_dora=True),
    "shira": ShiraConfig(r=8, target_modules=TARGETS),
}
PROMPTS = (
    "The capital of France is",
    "Write a Python function that returns the sum of two numbers.",
    "Once upon a time, in a village by the sea, there lived an old man who",
)
NEW = 60


@pytest.mark.slow
@pytest.mark.parametrize("method", CONFIGS)
def test_it_says_what_peft_says(method: str, tmp_path: Path) -> None:
    entry = ZOO["smollm2"]
    peft: Any = peft_files.make_peft(entry.model(), tmp_path / "a", CONFIGS[method], inputs=entry.inputs())
    tokenizer = tokenizers["smollm2"]
    batch = tokenizer(list(PROMPTS), return_tensors="pt", padding=True, padding_side="left")
    told = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    expected = peft.generate(**batch, **told, return_dict_in_generate=True, output_logits=True)
    width = batch["input_ids"].shape[1]
    made = lorac.compile(entry.model(), {"a": tmp_path / "a"}, target="onnxruntime", cache=True, self_test=False)
    answer = made.generate(**batch, **told)
    compared = assert_same_text(answer[:, width:], expected.sequences[:, width:], expected.logits)
    print(f"{method}: {compared} of {NEW * len(PROMPTS)} tokens are decided")
    assert compared
