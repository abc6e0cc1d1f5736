"""PEFT's checkpoints in ONNX Runtime: per model and mode one program that serves adapters of several methods."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, ShiraConfig

import lorac
from tests import parity
from tests.end_to_end.peft_cases import Case, checkpoints, example, joined, shapes
from tests.zoo import ZOO

DTYPE = torch.float32


def _cases(model: str, *configs: PeftConfig) -> tuple[str, tuple[Case, ...]]:
    return model, tuple(Case(name, model, config) for name, config in zip("abc", configs, strict=False))


def _lora(*targets: str, **settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": list(targets), **settings})


def _dora(*targets: str, **settings: Any) -> LoraConfig:
    return _lora(*targets, use_dora=True, **settings)


def _shira(*targets: str, r: int = 3) -> ShiraConfig:
    return ShiraConfig(r=r, target_modules=list(targets), random_seed=7)


ADAPTERS = dict(
    (
        _cases(
            "plain_mlp",
            _lora("embed", "up", "head", rank_pattern={"head": 1}, bias="all"),
            _dora("embed", "down", r=2, modules_to_save=["head"]),
            _shira("up"),
        ),
        _cases(
            "plain_conv",
            _lora("stem", "line", "head", lora_bias=True, rank_pattern={"stem": 1}),
            _dora("stem", "head", bias="all"),
        ),
        _cases(
            "resnet18",
            _lora("conv1", "conv2", "fc", rank_pattern={"conv1": 1}),
            _dora("downsample.0", "conv2", modules_to_save=["fc", "bn1"]),
        ),
        _cases(
            "tiny_llama",
            _lora("q_proj", "v_proj", "embed_tokens", "lm_head", use_rslora=True, rank_pattern={"v_proj": 1}),
            _dora(
                "k_proj",
                "up_proj",
                "gate_proj",
                "down_proj",
                exclude_modules=r".*\.1\..*",
                modules_to_save=["norm", "input_layernorm"],
            ),
            _shira("q_proj", "down_proj", r=1),
        ),
        _cases(
            "tiny_bert",
            _lora("query", "value", "dense", bias="all", modules_to_save=["classifier"]),
            _dora("query", "word_embeddings", modules_to_save=["LayerNorm"], rank_pattern={"query": 1}),
            _shira("key"),
        ),
        _cases(
            "tiny_gpt2",
            _lora("c_attn", "wte", bias="lora_only", fan_in_fan_out=True),
            _dora("c_attn", "c_proj", "c_fc", "lm_head", r=1, modules_to_save=["ln_f", "wpe"]),
        ),
        _cases(
            "tiny_albert",
            _lora("embedding_hidden_mapping_in", "query", "ffn", bias="all", rank_pattern={"ffn": 1}),
            _dora("query", "value", "ffn_output", modules_to_save=["classifier", "full_layer_layer_norm"]),
            _shira("key"),
        ),
        _cases(
            "tiny_vit",
            _lora("q_proj", "projection", "fc1", lora_bias=True, rank_pattern={"fc1": 1}),
            _dora("q_proj", "v_proj", "fc2", modules_to_save=["classifier", "layernorm"]),
            _shira("fc2"),
        ),
        _cases(
            "tiny_t5",
            _lora("q", "v", "shared", "wo", rank_pattern={"wo": 1}, layers_to_transform=[0]),
            _dora("q", "o", "relative_attention_bias", modules_to_save=["final_layer_norm"]),
            _shira("wi"),
        ),
    )
)


def _runs() -> Iterator[Any]:
    """Every model in every mode; ResNet, and merged modes of all but a few small models, wait for the long run."""
    for name, mode in itertools.product(ADAPTERS, ("live", "fused", "baked")):
        small = {"plain_mlp", "plain_conv", "tiny_bert"}
        late = name == "resnet18" or (mode != "live" and name not in small)
        yield pytest.param(name, mode, marks=pytest.mark.slow if late else ())


@pytest.mark.medium(
    "the live program, and runtime/test_swap.py binds fused weights there",
    cases=["plain_conv-live", "plain_mlp-fused", "tiny_bert-fused"],
)
@pytest.mark.slow(
    "plain, convolution and attention layers; BERT there, GPT-2 in eager",
    keep=["plain_mlp-live", "plain_mlp-fused", "plain_conv-live", "plain_conv-baked", "tiny_bert-fused"],
)
@pytest.mark.parametrize(("name", "mode"), list(_runs()))
def test_matches_peft(name: str, mode: str, tmp_path: Path) -> None:
    names, calls = ZOO[name].outputs, shapes(name, DTYPE)
    model, oracles = checkpoints(ADAPTERS[name], tmp_path, DTYPE)
    adapters = {key: tmp_path / key for key in oracles}
    only = {"active": "b"} if mode == "baked" else {}
    compiled = lorac.compile(model, adapters, target="onnxruntime", mode=mode, **only, **example(name))

    with torch.no_grad():
        base = joined([model(**inputs) for inputs in calls], names)
        references = {key: joined([oracle(**i) for i in calls], names) for key, oracle in oracles.items()}
    own_base = None if mode == "baked" else joined([compiled(**inputs, adapters=None) for inputs in calls], names)
    for key in ["b"] if mode == "baked" else oracles:
        if mode != "baked":
            compiled.swap(key)
        answers = [compiled(**inputs) for inputs in calls]
        ratios = parity.assert_parity(joined(answers, names), references[key], base, own_base=own_base)
        print(f"{name} {mode} {key}: {max(ratios.values()):.1e}")
