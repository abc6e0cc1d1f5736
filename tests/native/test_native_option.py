"""``native=``: the op of lorac-native in compiled programs, and the errors without it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lorac
from lorac import LoracError
from lorac.backends.onnxruntime.native_op import OP, use_native_op
from tests.emitted import read_emitted
from tests.limits import NATIVE, NATIVE_HALF
from tests.native.library import installed, needs_compiler

INPUTS = {"input_ids": torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9], [3, 2, 3, 8, 4]])}
VARIANTS: Mapping[str, lorac.Variant] = {
    "lora": lorac.LoRA(r=3, targets="all-linear"),
    "dora": lorac.DoRA(r=5, targets=["q_proj", "gate_proj", "down_proj"]),
    "vera": lorac.VeRA(r=7, targets=["q_proj", "v_proj"]),
    "ia3": lorac.IA3(targets=["k_proj", "v_proj", "down_proj"]),
}
CHOICES = (None, *VARIANTS, {"lora": 0.5, "dora": 0.25}, ["lora", "dora", "vera", "ia3"], ["lora", None, "lora", None])


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_model(24)


def make_model(hidden: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 40, "num_hidden_layers": 1, "vocab_size": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


@pytest.fixture(scope="module")
def adapters(model: LlamaForCausalLM) -> dict[str, lorac.Adapter]:
    return make_adapters(model)


def make_adapters(model: LlamaForCausalLM) -> dict[str, lorac.Adapter]:
    trained = lorac.compile(model, dict(VARIANTS)).adapters
    generator = torch.Generator().manual_seed(1)
    for adapter in trained.values():
        for tensor in adapter.parameters():
            tensor.data.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return dict(trained)


def _compile(model: LlamaForCausalLM, adapters: Mapping[str, lorac.Adapter], native: bool | str, **options: object):
    return lorac.compile(
        model, adapters, target="onnxruntime", active=None, native=native, threads=1, spinning=False, **options
    )


@pytest.mark.medium("test_add_low_rank.py compares the op, and test_an_artifact_runs_without_the_library a program")
@needs_compiler
def test_every_choice_matches_the_onnx_ops(
    model: LlamaForCausalLM, adapters: dict[str, lorac.Adapter], native: Path
) -> None:
    own, fast, half = (_compile(model, adapters, kind, self_test=kind is True) for kind in (False, True, "float16"))
    base = own(**INPUTS).logits
    first = {str(choice): fast(**INPUTS, adapters=choice).logits for choice in CHOICES}
    for choice in CHOICES:
        expected = own(**INPUTS, adapters=choice).logits
        added = (expected - base).norm()
        # A difference is carried on by the layers behind, as rounding is in any two programs.
        assert (first[str(choice)] - expected).norm() <= 10 * NATIVE * added + NATIVE * base.norm()
        assert (
            half(**INPUTS, adapters=choice).logits - expected
        ).norm() <= 10 * NATIVE_HALF * added + NATIVE * base.norm()
    assert torch.equal(fast(**INPUTS, adapters="lora").logits, first["lora"])
    assert "lorac-native adds the adapters of 7 of 7 sites" in str(fast.explain())
    assert "float16" in str(half.explain())
    assert "native" not in str(own.explain())


@pytest.mark.medium("test_an_artifact_runs_without_the_library")
@needs_compiler
@pytest.mark.parametrize("weights", [None, "int4"])
@pytest.mark.parametrize("hidden", [24, 64])
def test_the_op_is_all_that_an_adapter_adds_to_a_decoding_step(
    hidden: int, weights: str | None, native: Path, tmp_path: Path
) -> None:
    options, model = {"weights": weights, "cache": True, "self_test": False}, make_model(hidden)
    adapters = make_adapters(model)
    base, fast = (_compile(model, one, True, **options) for one in ({}, {"lora": adapters["lora"]}))
    # Attention does not rotate heads of 6 values. Then queries, keys and values are padded before they are rotated, and
    # so is what their pairs read, by indices made once.
    padding = {"GatherND": 1, "Shape": 1, "Concat": 1, "Reshape": 1} if hidden == 24 else {}
    assert _session_ops(fast) - _session_ops(base) == {OP: 4} | padding
    assert (_session_ops(base) - _session_ops(fast))["Add"] == 2  # residuals
    fast.save(tmp_path / "artifact")
    own = lorac.load(tmp_path / "artifact", native=False)
    padding = {"attention_mask": torch.arange(5) < torch.tensor([[5], [1], [3], [2]])}
    for choice in (None, "lora", ["lora", None, None, "lora"], ["lora", "lora", None, None]):
        for inputs in (INPUTS, INPUTS | padding):
            expected = own(**inputs, adapters=choice).logits
            assert (fast(**inputs, adapters=choice).logits - expected).norm() <= 10 * NATIVE * expected.norm()


def _session_ops(compiled: lorac.Compiled) -> Counter[str]:
    """The ops of the model in a session with the op of lorac-native."""
    model, _ = read_emitted(compiled)
    use_native_op(model)
    return Counter(node.op_type for node in model.graph.node)


@needs_compiler
def test_an_artifact_runs_without_the_library(
    model: LlamaForCausalLM, adapters: dict[str, lorac.Adapter], package: Path, tmp_path: Path
) -> None:
    one = {"lora": adapters["lora"]}
    with installed(package):
        compiled = _compile(model, one, True)
        expected = compiled(**INPUTS, adapters="lora").logits
        compiled.save(tmp_path / "artifact")
        assert torch.equal(lorac.load(tmp_path / "artifact")(**INPUTS, adapters="lora").logits, expected)
        own = lorac.load(tmp_path / "artifact", native=False)(**INPUTS, adapters="lora").logits
    with installed(None):
        loaded = lorac.load(tmp_path / "artifact")
        assert torch.equal(loaded(**INPUTS, adapters="lora").logits, own)
        assert 'pip install "lorac[native]"' in str(loaded.explain())


def test_rejects_the_option_without_the_library(model: LlamaForCausalLM) -> None:
    with installed(None):
        for kind in (True, "float16"):
            with pytest.raises(lorac.MissingExtra, match="lorac-native is not installed"):
                _compile(model, {}, kind)


@pytest.mark.parametrize("kind", ["bfloat16", 1, None])
def test_rejects_other_values(model: LlamaForCausalLM, kind: object) -> None:
    with pytest.raises(LoracError, match="native"):
        _compile(model, {}, kind)  # type: ignore[arg-type]  # it is what is tested


@needs_compiler
def test_rejects_values_beyond_float16(
    model: LlamaForCausalLM, adapters: dict[str, lorac.Adapter], native: Path
) -> None:
    large = copy.deepcopy(adapters["lora"])
    next(iter(large.parameters())).data.mul_(1e6)
    compiled = _compile(model, {"lora": large}, "float16", self_test=False)
    with pytest.raises(lorac.Unavailable, match="beyond 65504"):
        compiled.swap("lora")
    assert compiled.active == {}
