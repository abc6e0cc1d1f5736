"""After training: outputs, state dicts, files and exports of the trained tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lorac
from lorac.testing import assert_close
from tests import parity
from tests.peft_files import load_peft
from tests.training.loops import data, host, plain_loop, trained, variant
from tests.zoo import ZOO

METHODS = ("lora", "dora", "shira", "hydra")


def learned(method: str, name: str = "tiny_bert", *, steps: int = 6, **fields: Any) -> tuple[Any, Any]:
    """A host, and a compiled model of it after some steps."""
    model = host(name)
    compiled = lorac.compile(model, {"a": variant(method, name, **fields)})
    with torch.no_grad():
        compiled(**ZOO[name].inputs())  # what a stale cache would keep
    plain_loop(compiled, data(name, steps), lr=1e-2)
    return model, compiled


@torch.no_grad()
def answer(model: Any, name: str = "tiny_bert", **options: Any) -> torch.Tensor:
    return model(**ZOO[name].inputs(seed=5), **options).logits


@pytest.mark.medium("a branch and a sparse change", keep=["shira-fused", "hydra-live"])
@pytest.mark.parametrize("mode", ["live", "fused"])
@pytest.mark.parametrize("method", METHODS)
def test_eval_answers_with_the_trained_tensors(method: str, mode: str) -> None:
    model = host("tiny_bert")
    compiled = lorac.compile(model, {"a": variant(method, "tiny_bert")}, mode=mode)
    before = answer(compiled)
    plain_loop(compiled, data("tiny_bert", 6), lr=2e-2)
    again = lorac.compile(model, {"a": compiled.adapters["a"]}, mode=mode)
    assert torch.equal(answer(compiled), answer(again))
    assert not torch.equal(answer(compiled), before)
    assert torch.equal(answer(compiled, adapters=None), answer(model))
    # With gradients recorded, the terms are computed anew from the tensors: the same answer to rounding.
    recorded = compiled(**ZOO["tiny_bert"].inputs(seed=5)).logits
    assert_close(recorded.detach(), answer(compiled))


def test_eval_updates_the_model_after_training() -> None:
    _, compiled = learned("lora")
    with torch.no_grad():
        assert torch.equal(compiled.host(**ZOO["tiny_bert"].inputs(seed=5)).logits, answer(compiled))


@pytest.mark.medium("the same of LoRA", keep=["lora"])
@pytest.mark.parametrize("method", METHODS)
def test_a_state_dict_round_trips(method: str) -> None:
    fields = {"modules_to_save": ("classifier",), "bias": "all"} if method == "lora" else {}
    model, compiled = learned(method, **fields)
    other = lorac.compile(model, {"a": variant(method, "tiny_bert", **fields)})
    if method != "shira":  # its positions are drawn alike; its values start at zero
        assert not torch.equal(answer(other), answer(compiled))
    assert other.state_dict().keys() == compiled.state_dict().keys()
    other.load_state_dict(compiled.state_dict())
    assert torch.equal(answer(other), answer(compiled))


def test_saved_modules_and_biases_train_too() -> None:
    fields = {"modules_to_save": ("classifier",), "bias": "all"}
    model, compiled = learned("lora", **fields)
    replaced = compiled.adapters["a"].replaced
    state = dict(model.named_parameters())
    assert {"classifier.weight", "classifier.bias", "bert.encoder.layer.0.output.LayerNorm.bias"} <= replaced.keys()
    # A key's bias shifts every score of a query alike, and softmax forgets it.
    moved = {name for name, tensor in replaced.items() if not torch.equal(tensor, state[name])}
    assert {name for name in replaced if "key" not in name} <= moved
    assert {id(t) for t in trained(compiled)} == {id(t) for t in compiled.adapters["a"].parameters()}


@pytest.mark.medium("DoRA", keep=["dora"])
@pytest.mark.parametrize("method", ["lora", "dora", "shira"])
def test_peft_reads_a_trained_adapter(method: str, tmp_path: Path) -> None:
    model, compiled = learned(method)
    lorac.save_adapter(compiled.adapters["a"], tmp_path, format="peft", model=model)
    reference = answer(load_peft(model, tmp_path))
    parity.assert_parity({"logits": answer(compiled)}, {"logits": reference}, {"logits": answer(model)})


@pytest.mark.slow("one dtype", keep=["lora"])
@pytest.mark.parametrize("method", METHODS)
def test_autocast_trains(method: str) -> None:
    compiled = lorac.compile(host("tiny_llama"), {"a": variant(method, "tiny_llama")})
    with torch.autocast("cpu", torch.bfloat16):
        losses = plain_loop(compiled, data("tiny_llama", 10, distinct=False), lr=5e-3)
    assert losses[-1] <= 0.95 * losses[0], losses
    assert all(tensor.dtype == torch.float32 for tensor in trained(compiled))


@pytest.mark.medium("DoRA, whose magnitude is of the base", keep=["dora"])
@pytest.mark.parametrize("method", METHODS)
def test_a_bfloat16_base_trains_float32_adapters(method: str) -> None:
    model = ZOO["tiny_llama"].fresh(torch.bfloat16)
    compiled = lorac.compile(model, {"a": variant(method, "tiny_llama")})
    losses = plain_loop(compiled, data("tiny_llama", 10, distinct=False), lr=5e-3)
    assert losses[-1] <= 0.95 * losses[0], losses
    assert all(tensor.dtype == torch.float32 for tensor in trained(compiled))


@pytest.mark.medium("test_eval_answers_with_the_trained_tensors")
def test_the_export_holds_the_trained_values() -> None:
    model, compiled = learned("dora")
    engine = compiled.export(target="onnxruntime")
    inputs = ZOO["tiny_bert"].inputs(seed=5)
    parity.assert_parity({"logits": engine(**inputs).logits}, {"logits": answer(compiled)}, {"logits": answer(model)})
