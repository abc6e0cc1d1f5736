"""Files of one dtype on bases of another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig

import lorac
from tests import parity
from tests.end_to_end.peft_cases import Case, checkpoint, example, joined, shapes
from tests.peft_files import load_peft
from tests.zoo import ZOO

BF16 = torch.bfloat16
STRONG = 0.3  # of the base's output: half precision must not hide behind its own rounding


def _case(model: str, *, dora: bool) -> Case:
    targets = [target for target in ZOO[model].targets if target != "grouped"]
    return Case("dora" if dora else "lora", model, LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_dora=dora))


@pytest.mark.medium("LoRA; a model of convolutions", cases=["plain_conv-dora*", "tiny_bert-*"])
@pytest.mark.slow("float32 bases; two other hosts", cases=["*-torch.float64", "tiny_gpt2-*", "tiny_llama-*"])
@pytest.mark.parametrize("base", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", ["plain_conv", "tiny_llama", "tiny_bert", "tiny_gpt2"])
def test_a_bf16_file_on_a_wider_base(name: str, dora: bool, base: torch.dtype, tmp_path: Path) -> None:
    case, calls = _case(name, dora=dora), shapes(name, base)
    model, oracle = checkpoint(case, tmp_path, base, dtype=BF16)
    with torch.no_grad():
        reference, plain = (joined([host(**i) for i in calls], case.compared) for host in (oracle, model))
        for mode in ("live", "fused", "baked"):
            compiled = lorac.compile(model, {"a": tmp_path}, mode=mode)
            parity.assert_parity(joined([compiled(**i) for i in calls], case.compared), reference, plain)


@pytest.mark.medium("DoRA; plain models", cases=["plain_mlp-lora-*", "tiny_bert-*"])
@pytest.mark.slow("three other hosts; two other hosts", cases=["tiny_t5-*", "tiny_gpt2-*"])
@pytest.mark.parametrize("file", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", ["plain_mlp", "tiny_bert", "tiny_gpt2", "tiny_t5"])
def test_a_file_on_a_bf16_base(name: str, dora: bool, file: torch.dtype, tmp_path: Path) -> None:
    """The reference is PEFT over the same weights in float32; of the base's own rounding 4 times is allowed."""
    case, calls = _case(name, dora=dora), shapes(name, torch.float32)
    half, wide = ZOO[name].fresh(BF16), ZOO[name].fresh(BF16).float()
    checkpoint(case, tmp_path, torch.float32, dtype=file, contribution=STRONG)
    oracle = load_peft(wide, tmp_path)
    with torch.no_grad():
        reference, plain = (joined([host(**i) for i in calls], case.compared) for host in (oracle, wide))
        rounded = joined([half(**i) for i in shapes(name, BF16)], case.compared)
        for mode in ("live", "fused", "baked"):
            compiled = lorac.compile(half, {"a": tmp_path}, mode=mode)
            answers = [compiled(**i) for i in shapes(name, BF16)]
            assert all(value.dtype == BF16 for value in parity_leaves(answers[0], case))
            parity.assert_parity(joined(answers, case.compared), reference, plain, own_base=rounded)


@pytest.mark.medium("test_precision.py: a target that lacks the dtype")
@pytest.mark.slow("convolutions and a linear layer", cases=["tiny_bert"])
@pytest.mark.parametrize("name", ["plain_conv", "tiny_bert"])
def test_a_bf16_base_in_onnxruntime_computes_in_float32(name: str, tmp_path: Path) -> None:
    case, calls = _case(name, dora=True), shapes(name, torch.float32)
    half, wide = ZOO[name].fresh(BF16), ZOO[name].fresh(BF16).float()
    checkpoint(case, tmp_path, torch.float32, dtype=BF16)
    oracle = load_peft(wide, tmp_path)
    with pytest.warns(lorac.LoracWarning, match="no kernels for bfloat16"):
        compiled = lorac.compile(half, {"a": tmp_path}, target="onnxruntime", **example(name))
    with torch.no_grad():
        reference, plain = (joined([host(**i) for i in calls], case.compared) for host in (oracle, wide))
    parity.assert_parity(joined([compiled(**i) for i in calls], case.compared), reference, plain)
    assert compiled(**shapes(name, BF16)[0]) is not None  # inputs in the host's own dtype are taken too
    assert all(parameter.dtype == BF16 for parameter in half.parameters())


def parity_leaves(answer: object, case: Case) -> list[torch.Tensor]:
    """The outputs that count, in their own dtype."""
    named = {"output": answer} if isinstance(answer, torch.Tensor) else dict(answer)  # type: ignore[call-overload]
    return [named[name] for name in case.compared]
