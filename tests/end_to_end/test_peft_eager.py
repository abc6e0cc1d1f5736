"""PEFT's checkpoints of LoRA, DoRA and SHiRA in eager: every configuration, live, fused and baked."""

from __future__ import annotations

from pathlib import Path

import pytest

import lorac
from tests.end_to_end.peft_cases import CASES, Case, checkpoint
from tests.end_to_end.peft_parity import Checkpoint, assert_eager
from tests.refusing import refuses


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_what_peft_computes(case: Case, tmp_path: Path) -> None:
    assert_eager(Checkpoint.of(case, tmp_path, case.dtype))


@pytest.mark.parametrize("case", [case for case in CASES if case.modes == ("live",)], ids=lambda case: case.id)
def test_a_grouped_kernel_cannot_hold_what_leaves_its_blocks(case: Case, tmp_path: Path) -> None:
    model, _ = checkpoint(case, tmp_path, case.dtype)
    for mode in ("fused", "baked"):
        with refuses("not_mergeable", match=r"'grouped'.*grouped convolution"):
            lorac.compile(model, {"a": tmp_path}, mode=mode)
