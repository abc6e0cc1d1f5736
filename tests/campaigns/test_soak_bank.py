"""The soak of a bank, short: every kind of operation happens, and none of them goes wrong; and a leak is seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from campaigns import soak_bank, tally
from lorac.target.memory_budget import MemoryBudget
from tests.campaigns.test_soak import BETWEEN_OPEN_AND_WITH, small

KINDS = {
    "all removed", "call", "call of its own choice", "call while exchanged", "exchange",
    "failing swap", "held", "interrupted", "let go of all", "read ahead", "swap", "within the budget",
}  # fmt: skip
__all__ = ["small"]
pytestmark = [BETWEEN_OPEN_AND_WITH, pytest.mark.medium("runtime/test_bank.py: such operations in one thread")]


@pytest.fixture
def run(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> soak_bank.BankSoak:
    few = ("lora", "alike", "too", "dora")
    monkeypatch.setattr(soak_bank, "VARIANTS", {name: soak_bank.VARIANTS[name] for name in few})
    monkeypatch.setattr(soak_bank, "CHOICES", [None, *few, {"lora": 0.7, "dora": 0.3}])
    return soak_bank.BankSoak(0, [soak_bank.Bank(tmp_path)])


def test_nothing_goes_wrong(run: soak_bank.BankSoak) -> None:
    found = run.run(1500)
    assert {kind.partition(",")[0] for kind in found["count"]} >= KINDS
    assert tally.wrong([found | {"end": found["start"]}]) == {}


def test_detects_bytes_that_stay_counted(run: soak_bank.BankSoak, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryBudget, "_settle", lambda self: None)
    run._round(run.models[0])
    assert run.count["wrong let go of all"]
