"""Weighted mixtures of LoRA against PEFT's exact one: ``add_weighted_adapter(combination_type="cat")``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel

import lorac
from tests import parity
from tests.end_to_end.peft_cases import Case, checkpoint, example, joined, shapes
from tests.peft_files import quiet
from tests.zoo import ZOO

WEIGHTS = {"a": 0.7, "b": 0.4}


def _mixed(name: str, folder: Path, dtype: torch.dtype) -> tuple[torch.nn.Module, PeftModel]:
    """A base with two checkpoints in ``folder``, and PEFT's model with both of them mixed."""
    targets = [target for target in ZOO[name].targets if target != "grouped"]
    one = LoraConfig(r=3, lora_alpha=5, target_modules=targets)
    two = LoraConfig(r=1, lora_alpha=2, target_modules=targets, use_rslora=True)
    model, oracle = checkpoint(Case("a", name, one), folder / "a", dtype)
    checkpoint(Case("b", name, two), folder / "b", dtype, seed=3)
    with quiet():
        oracle.load_adapter(str(folder / "b"), "b")
        oracle.add_weighted_adapter(
            ["default", "b"], list(WEIGHTS.values()), adapter_name="mixed", combination_type="cat"
        )
        oracle.set_adapter("mixed")
    return model, oracle.eval()


@pytest.mark.medium("shared layers", keep=["tiny_albert"])
@pytest.mark.slow("five other hosts", cases=["tiny_t5"])
@pytest.mark.parametrize("name", ["plain_mlp", "tiny_llama", "tiny_gpt2", "tiny_vit", "tiny_albert", "tiny_t5"])
def test_in_eager(name: str, tmp_path: Path) -> None:
    model, oracle = _mixed(name, tmp_path, torch.float64)
    calls, names = shapes(name, torch.float64), ZOO[name].outputs
    with torch.no_grad():
        reference, base = (joined([host(**i) for i in calls], names) for host in (oracle, model))
        for mode in ("live", "fused"):
            compiled = lorac.compile(model, {key: tmp_path / key for key in WEIGHTS}, mode=mode)
            assert compiled.active == {}
            chosen = joined([compiled(**i, adapters=WEIGHTS) for i in calls], names)
            parity.assert_parity(chosen, reference, base)
            compiled.swap(WEIGHTS)
            swapped = joined([compiled(**i) for i in calls], names)
            assert all(torch.equal(swapped[key], chosen[key]) for key in names)


@pytest.mark.medium("mixtures in eager, and runtime/test_swap.py's on ONNX Runtime")
@pytest.mark.slow("the live one", cases=["fused"])
@pytest.mark.parametrize("mode", ["live", "fused"])
def test_in_onnxruntime(mode: str, tmp_path: Path) -> None:
    name = "tiny_albert"
    model, oracle = _mixed(name, tmp_path, torch.float32)
    calls, names = shapes(name, torch.float32), ZOO[name].outputs
    with torch.no_grad():
        reference, base = (joined([host(**i) for i in calls], names) for host in (oracle, model))
    adapters = {key: tmp_path / key for key in WEIGHTS}
    compiled = lorac.compile(model, adapters, target="onnxruntime", mode=mode, active=WEIGHTS, **example(name))
    parity.assert_parity(joined([compiled(**i) for i in calls], names), reference, base)
