"""PEFT's checkpoints of LoRA, DoRA and SHiRA in eager: every configuration, live, fused and baked."""

from __future__ import annotations

from pathlib import Path

import pytest

import lorac
from tests.end_to_end.peft_cases import CASES, Case, checkpoint
from tests.end_to_end.peft_parity import Checkpoint, assert_eager
from tests.refusing import refuses


@pytest.mark.medium(
    "each field on one plain model or a Llama",
    keep=[
        "tiny_llama-tied_both",
        "tiny_llama-embeddings",
        "tiny_llama-regex",
        "*-saved",
        "*-grouped",
        "plain_mlp-dora",
        "plain_mlp-lora",
        "tiny_bert-lora",
        "tiny_gpt2-lora",
        "plain_conv-dora",
        "plain_conv-lora",
        "plain_mlp-shira",
        "*-dora_embedding",
        "plain_mlp-bias_all",
        "plain_conv-lora_bias",
    ],
)
@pytest.mark.slow(
    "the same configurations on a Llama and on plain models",
    keep=[
        "tiny_bert-lora",
        "tiny_bert-embeddings",
        "tiny_bert-bias_all",
        "tiny_vit-patches",
        "tiny_t5-shared",
        "tiny_t5-relative",
        "tiny_albert-dora",
        "tiny_gpt2-tied",
        "tiny_gpt2-lora",
        "tiny_llama-*",
        "plain_mlp-*",
        "plain_conv-*",
    ],
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_matches_peft(case: Case, tmp_path: Path) -> None:
    assert_eager(Checkpoint.of(case, tmp_path, case.dtype))


@pytest.mark.parametrize("case", [case for case in CASES if case.modes == ("live",)], ids=lambda case: case.id)
def test_rejects_fusing_across_the_blocks_of_a_grouped_kernel(case: Case, tmp_path: Path) -> None:
    model, _ = checkpoint(case, tmp_path, case.dtype)
    for mode in ("fused", "baked"):
        with refuses("not_mergeable", match=r"'grouped'.*grouped convolution"):
            lorac.compile(model, {"a": tmp_path}, mode=mode)
