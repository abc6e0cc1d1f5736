"""Short runs of the campaign that compares ``lorac check`` with ``lorac.compile``, and lorac's answers with PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lorac
from campaigns import fit, sound


@pytest.mark.medium("session/test_adapter_check.py")
def test_check_exits_with_0_exactly_where_compile_accepts(tmp_path: Path) -> None:
    sound.write(tmp_path, quick=True, artifacts=False)
    outcomes, wrong = fit.compare_files(tmp_path, 24, seed=0)
    assert wrong == []
    assert min(outcomes["taken"], outcomes["refused"]) >= 5


class Small(nn.Module):
    """A model with the input of PEFT's tests."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.lin0, self.lin1 = nn.Linear(10, 20), nn.Linear(20, 2)

    def forward(self, X: torch.Tensor) -> torch.Tensor:  # PEFT's name
        return self.lin1(torch.relu(self.lin0(X.float() / 90)))


def test_finds_answers_that_are_not_peft_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"r": 2, "target_modules": ["lin0"]}
    found = fit.compare_answers(Small, peft.LoraConfig, fields, tmp_path / "right")
    assert found.startswith("right: {'eager'") and "'onnxruntime'" in found and found.endswith("'back': 0.0}")
    compile_: Any = lorac.compile
    monkeypatch.setattr(lorac, "compile", lambda *args, **options: compile_(*args, **options, active={"a": 0.9}))
    assert fit.compare_answers(Small, peft.LoraConfig, fields, tmp_path / "wrong").startswith("wrong: {'eager': 0.1")
