"""LoRA's and DoRA's curves are PEFT's: the same init, data and random numbers (BERT's own dropout too), 20 steps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

import lorac
from tests.peft_files import WEIGHTS, quiet
from tests.training.loops import TARGETS, data, host, plain_loop

STEPS = 20
CASES = [
    pytest.param("tiny_llama", {}, id="llama-lora"),
    pytest.param("tiny_llama", {"use_dora": True}, id="llama-dora"),
    pytest.param("tiny_llama", {"lora_dropout": 0.1, "use_rslora": True}, id="llama-lora-dropout"),
    pytest.param("tiny_bert", {"modules_to_save": ["classifier"], "bias": "lora_only"}, id="bert-lora-saved-bias"),
    pytest.param("tiny_bert", {"use_dora": True}, id="bert-dora"),
    pytest.param("minilm", {}, id="minilm-lora", marks=pytest.mark.slow),
    pytest.param("minilm", {"use_dora": True}, id="minilm-dora", marks=pytest.mark.slow),
    pytest.param("minilm", {"lora_dropout": 0.1}, id="minilm-lora-dropout", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "fields"), CASES)
def test_the_curve_is_pefts(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = host(name)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS[name]), **fields)
    with quiet():
        oracle = get_peft_model(copy.deepcopy(model), config)
        oracle.save_pretrained(tmp_path / "init")
    compiled = lorac.compile(model, {"a": tmp_path / "init"})

    batches = data(name, STEPS, rows=2, length=8)
    expected = plain_loop(oracle, batches, lr=5e-3, decay=0.01)
    losses = plain_loop(compiled, batches, lr=5e-3, decay=0.01)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=0)

    lorac.save_adapter(compiled.adapters["a"], tmp_path / "trained", format="peft", model=model)
    found = load_file(tmp_path / "trained" / WEIGHTS)
    with quiet():
        reference = get_peft_model_state_dict(oracle)
    start = load_file(tmp_path / "init" / WEIGHTS)
    assert found.keys() == reference.keys()
    for key, tensor in reference.items():
        assert not torch.equal(tensor, start[key]), f"PEFT did not train {key}"
        assert (found[key] - tensor).norm() <= 1e-3 * tensor.norm(), key
