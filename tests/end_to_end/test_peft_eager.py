"""PEFT's checkpoints in eager: every configuration, live, fused and baked, decided in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lorac
from lorac.errors import NotMergeable
from tests import parity
from tests.end_to_end.peft_cases import CASES, Case, checkpoint, joined, shapes

DTYPE = torch.float64
GROUPED = [case for case in CASES if case.modes == ("live",)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_what_peft_computes(case: Case, tmp_path: Path) -> None:
    model, oracle = checkpoint(case, tmp_path, DTYPE)
    calls = shapes(case.model, DTYPE)
    with torch.no_grad():
        reference, base = ([host(**inputs) for inputs in calls] for host in (oracle, model))
        for mode in case.modes:
            compiled = lorac.compile(model, {"a": tmp_path}, mode=mode)
            answers = [compiled(**inputs) for inputs in calls]
            assert [type(answer) for answer in answers] == [type(answer) for answer in base]
            parity.assert_parity(*(joined(outputs, case.compared) for outputs in (answers, reference, base)))


@pytest.mark.parametrize("mode", ["fused", "baked"])
@pytest.mark.parametrize("case", GROUPED, ids=lambda case: case.id)
def test_a_grouped_kernel_cannot_hold_what_leaves_its_blocks(case: Case, mode: str, tmp_path: Path) -> None:
    model, _ = checkpoint(case, tmp_path, DTYPE)
    with pytest.raises(NotMergeable, match=r"'grouped'.*grouped convolution"):
        lorac.compile(model, {"a": tmp_path}, mode=mode)
