"""Every experiment runs, tiny, on the path of the full run; and verdicts tell differences from noise."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments import __main__ as runner
from experiments import _study
from experiments._study import CONTRARY, NOT_SHOWN, SHOWN, Expected, Finding, Table


@pytest.mark.medium("test_docstrings_give_claim_source_and_command imports each")
@pytest.mark.parametrize("name", runner.NAMES)
def test_runs_and_gives_a_verdict(name: str, capsys: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--smoke", "--json", str(tmp_path / "result.json")])
    monkeypatch.delitem(sys.modules, f"experiments.{name}", raising=False)  # runpy warns of a module that was imported
    runpy.run_module(f"experiments.{name}", run_name="__main__")
    said = capsys.readouterr().out
    assert "2 seeds, 2 steps" in said
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert f"verdict: {result['verdict']}" in said
    assert result["verdict"] in {SHOWN, NOT_SHOWN, CONTRARY}
    assert runner.details(name, result).startswith(f"## {name}\n")


@pytest.mark.parametrize("name", runner.NAMES)
def test_docstrings_give_claim_source_and_command(name: str) -> None:
    experiment, text = runner.load(name), sys.modules[f"experiments.{name}"].__doc__ or ""
    assert experiment.claim.endswith(".") and "arXiv" in experiment.source
    assert f"python -m experiments.{name} [--seeds {experiment.seeds}] [--steps {experiment.steps}] [--smoke]" in text


def test_compares_two_series() -> None:
    assert _study.compared([1.0, 2.0, 3.0], [2.0, 3.1, 4.0]).endswith(": lower")
    assert _study.compared([2.0, 3.1, 4.0], [1.0, 2.0, 3.0]).endswith(": higher")
    assert _study.compared([1.0, 2.0, 3.0], [2.0, 1.0, 3.0]).endswith(": does not separate")
    assert _study.compared([float("inf"), 1.0], [1.0, 1.0]) == "diverges"


def test_the_verdict_is_of_all_that_was_expected() -> None:
    table = Table("t", "loss", {"low": [1.0, 1.1, 1.2], "high": [2.0, 2.1, 2.3], "near": [1.0, 1.2, 1.1]})

    def verdict(*expected: tuple[str | float, str | float]) -> str:
        return Finding([table], [Expected("t", *pair) for pair in expected]).verdict

    assert verdict(("low", "high")) == verdict(("low", "high"), ("low", 1.5), (1.5, "high")) == SHOWN
    assert verdict(("low", "high"), ("low", "near")) == NOT_SHOWN
    assert verdict(("low", "near"), ("high", "low")) == CONTRARY


def test_ranks_a_diverged_side_last() -> None:
    table = Table("t", "loss", {"fine": [1.0, 1.0], "diverged": [float("inf"), 1.0]})
    assert Finding([table], [Expected("t", "fine", "diverged")]).verdict == SHOWN
    assert Finding([table], [Expected("t", "diverged", "fine")]).verdict == CONTRARY


def test_keeps_infinity_after_a_nan() -> None:
    found = _study.trained(lambda step: [1.0, float("nan"), 0.1][step], 2)
    assert found == [1.0, float("inf"), float("inf")]
    assert _study.log_mean(found) == float("inf") and _study.last(found) == float("inf")
    assert _study.log_mean([5.0, 10.0, 1000.0]) == 2.0
