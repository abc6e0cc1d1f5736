"""PEFT's checkpoints of the two real models, SmolLM2 (30 layers, tied embeddings) and MiniLM."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, ShiraConfig

import lorac
from tests import parity
from tests.end_to_end.peft_cases import Case, checkpoints, joined, shapes
from tests.zoo import ZOO

pytestmark = pytest.mark.slow("test_peft_onnxruntime.py and test_peft_eager.py on a tiny BERT")

MODES = ("live", "fused", "baked")
CONFIGS: dict[str, dict[str, PeftConfig]] = {
    "minilm": {
        "lora": LoraConfig(
            r=3,
            lora_alpha=5,
            target_modules="all-linear",
            rank_pattern={"query": 1},
            alpha_pattern={"output.dense": 2},
            bias="all",
        ),
        "dora": LoraConfig(
            r=4,
            use_dora=True,
            target_modules=["query", "value", "word_embeddings"],
            layers_to_transform=[0, 2, 5],
            layers_pattern="layer",
            modules_to_save=["pooler.dense"],
        ),
        "shira": ShiraConfig(r=2, target_modules=["key", "dense"], random_seed=7),
    },
    "smollm2": {
        "lora": LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=list(ZOO["smollm2"].targets),
            use_rslora=True,
            rank_pattern={"q_proj": 3},
            layers_to_transform=[4, 9, 14, 19, 24, 29],
        ),
        "dora": LoraConfig(
            r=3,
            use_dora=True,
            target_modules=["q_proj", "v_proj", "gate_proj"],
            exclude_modules=r".*layers\.(?!0|14).*",
        ),
    },
    "smollm2, every layer": {
        "lora": LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_rslora=True),
        "dora": LoraConfig(r=3, use_dora=True, target_modules=["q_proj", "v_proj", "embed_tokens"]),
    },
}


def _compare(of: str, modes: Sequence[str], target: str, dtype: torch.dtype, folder: Path) -> None:
    name = of.partition(",")[0]
    names, calls = ZOO[name].outputs, shapes(name, dtype)
    cases = [Case(key, name, config) for key, config in CONFIGS[of].items()]
    model, oracles = checkpoints(cases, folder, dtype)
    adapters = {key: folder / key for key in oracles}
    with torch.no_grad():
        base = joined([model(**inputs) for inputs in calls], names)
        references = {key: joined([oracle(**i) for i in calls], names) for key, oracle in oracles.items()}
    for mode in modes:
        chosen = list(oracles)[:1] if mode == "baked" else list(oracles)
        begun = time.perf_counter()
        compiled = lorac.compile(model, adapters, target=target, mode=mode, active=chosen[0], self_test=False)
        print(f"{name} {target} {mode}: compiled in {time.perf_counter() - begun:.1f} s")
        own_base = None
        with torch.no_grad():
            if mode != "baked" and dtype != torch.float64:  # where no rounding of the base's own is allowed for
                own_base = joined([compiled(**inputs, adapters=None) for inputs in calls], names)
            for key in chosen:
                if mode != "baked":
                    compiled.swap(key)
                answers = joined([compiled(**inputs) for inputs in calls], names)
                ratios = parity.assert_parity(answers, references[key], base, own_base=own_base)
                print(f"{name} {target} {mode} {key}: {max(ratios.values()):.1e}")


# SmolLM2 takes a minute in eager, and one per mode in ONNX Runtime: it is in the long run, with adapters on some of its
# layers and on all.
SLOW = pytest.param("smollm2, every layer", MODES, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("of", "modes"), [("minilm", MODES), pytest.param("smollm2", MODES, marks=pytest.mark.slow), SLOW]
)
def test_in_eager(of: str, modes: Sequence[str], tmp_path: Path) -> None:
    _compare(of, modes, "eager", torch.float64, tmp_path)


@pytest.mark.parametrize(
    ("of", "modes"),
    [
        ("minilm", MODES[:2]),
        pytest.param("minilm", MODES[2:], marks=pytest.mark.slow),
        pytest.param("smollm2", MODES[:1], marks=pytest.mark.slow),
        SLOW,
    ],
)
def test_in_onnxruntime(of: str, modes: Sequence[str], tmp_path: Path) -> None:
    _compare(of, modes, "onnxruntime", torch.float32, tmp_path)
