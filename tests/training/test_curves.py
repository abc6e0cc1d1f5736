"""The curves are PEFT's: the same init, data and random numbers (BERT's own dropout too), 20 steps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    BOFTConfig,
    FourierFTConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    OSFConfig,
    PeftConfig,
    PveraConfig,
    RandLoraConfig,
    ShiraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file

import lorac
from tests.limits import assert_curve, assert_trained
from tests.peft_files import WEIGHTS, quiet
from tests.training.loops import TARGETS, data, host, plain_loop

STEPS, LR = 20, 1e-2


def _case(name: str, title: str, kind: type[PeftConfig], *, slow: bool = False, **fields: Any) -> Any:
    config = kind(**{"target_modules": list(TARGETS[name]), **fields})  # type: ignore[arg-type]
    return pytest.param(name, config, id=f"{name}-{title}", marks=pytest.mark.slow if slow else ())


def _lora(name: str, title: str = "lora", **fields: Any) -> Any:
    return _case(name, title, LoraConfig, **{"r": 4, "lora_alpha": 8, **fields})


IA3: dict[str, Any] = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
CASES = [
    _lora("tiny_llama"),
    _lora("tiny_llama", "dora", use_dora=True),
    _lora("tiny_llama", "lora-dropout", lora_dropout=0.1, use_rslora=True),
    _lora("tiny_bert", "lora-saved-bias", modules_to_save=["classifier"], bias="lora_only"),
    _lora("tiny_bert", "dora", use_dora=True),
    _case("tiny_llama", "oft", OFTConfig),
    _case("tiny_llama", "hira", HiraConfig, r=4),
    _case("tiny_llama", "vera", VeraConfig, r=16),
    _case("tiny_llama", "pvera", PveraConfig, r=16, pvera_dropout=0.1),
    _case("tiny_llama", "osf", OSFConfig, effective_rank=0.75),
    # Not AdaLoRA: PEFT's model adds a penalty to the loss, and prunes.
    _case("tiny_llama", "bat", MissConfig, r=8, init_weights="bat", slow=True),
    _case("tiny_llama", "boft", BOFTConfig, boft_block_size=8, slow=True),
    _case("tiny_llama", "fourierft", FourierFTConfig, n_frequency=100, slow=True),
    _case("tiny_llama", "hra", HRAConfig, r=4, slow=True),
    _case("tiny_llama", "ia3", IA3Config, **IA3, slow=True),
    _case("tiny_llama", "ln_tuning", LNTuningConfig, target_modules=["input_layernorm", "norm"], slow=True),
    _case("tiny_llama", "loha", LoHaConfig, r=3, alpha=6, slow=True),
    _case("tiny_llama", "lokr", LoKrConfig, r=2, alpha=5, decompose_both=True, slow=True),
    _case("tiny_llama", "miss", MissConfig, r=4, slow=True),
    _case("tiny_llama", "randlora", RandLoraConfig, r=8, randlora_alpha=16, slow=True),
    _case("tiny_llama", "shira", ShiraConfig, r=8, slow=True),
    _case("tiny_llama", "vblora", VBLoRAConfig, r=2, num_vectors=20, vector_length=16, slow=True),
    _case("tiny_bert", "miss-mini", MissConfig, r=4, init_weights="mini", mini_r=2, miss_dropout=0.1, slow=True),
    _case("tiny_bert", "oft-exact", OFTConfig, r=6, oft_block_size=0, use_cayley_neumann=False, slow=True),
    _case("tiny_bert", "vera-dropout", VeraConfig, r=16, vera_dropout=0.1, modules_to_save=["classifier"], slow=True),
    _lora("minilm", slow=True),
    _lora("minilm", "dora", use_dora=True, slow=True),
    _lora("minilm", "lora-dropout", lora_dropout=0.1, slow=True),
]


@pytest.mark.medium("two methods; test_learning.py and test_trained.py compare the same outputs")
@pytest.mark.slow(
    "LoRA with dropout, DoRA and OFT",
    keep=["tiny_llama-lora-dropout", "tiny_bert-dora", "tiny_llama-oft", "tiny_llama-pvera", "tiny_llama-osf"],
)
@pytest.mark.parametrize(("name", "config"), CASES)
def test_the_curve_is_pefts(name: str, config: PeftConfig, tmp_path: Path) -> None:
    model = host(name)
    with quiet():
        oracle: Any = get_peft_model(copy.deepcopy(model), copy.deepcopy(config))  # type: ignore[arg-type]
        oracle.save_pretrained(tmp_path / "init")
    compiled = lorac.compile(model, {"a": tmp_path / "init"})

    batches = data(name, STEPS, rows=2, length=8)
    expected = plain_loop(oracle, batches, lr=LR, decay=0.01)
    losses = plain_loop(compiled, batches, lr=LR, decay=0.01)
    assert_curve(losses, expected)

    lorac.save_adapter(compiled.adapters["a"], tmp_path / "trained", format="peft", model=model)
    found = load_file(tmp_path / "trained" / WEIGHTS)
    with quiet():
        reference = get_peft_model_state_dict(oracle)
    start = load_file(tmp_path / "init" / WEIGHTS)
    # Frozen tensors are in files, too: VeRA's projections, which seeds would give; RandLoRA's, a copy at every site.
    moved = {key for key, tensor in reference.items() if not torch.equal(tensor, start[key])}
    assert len(moved) == sum(p.requires_grad for p in oracle.parameters()), "PEFT did not train all it could"
    assert moved <= found.keys() <= reference.keys()
    for key, tensor in found.items():
        if key not in moved:
            assert torch.equal(tensor, reference[key]), f"{key} changed"
            continue
        assert_trained(tensor, reference[key], start[key])
