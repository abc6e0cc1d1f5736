"""Every experiment runs, tiny, on the path of the full run; and differences are told from noise."""

from __future__ import annotations

import pkgutil
import runpy
import sys
from typing import Any

import pytest

import experiments
from experiments import _study

NAMES = [found.name for found in pkgutil.iter_modules(experiments.__path__) if not found.name.startswith("_")]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_prints_its_sides(name: str, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--smoke"])
    monkeypatch.delitem(sys.modules, f"experiments.{name}", raising=False)  # runpy warns of a module that was imported
    runpy.run_module(f"experiments.{name}", run_name="__main__")
    said = capsys.readouterr().out
    assert "against LoRA" in said and "2 seeds, 2 steps" in said


def test_what_separates() -> None:
    assert _study.compared([1.0, 2.0, 3.0], [2.0, 3.1, 4.0]).endswith(": lower")
    assert _study.compared([2.0, 3.1, 4.0], [1.0, 2.0, 3.0]).endswith(": higher")
    assert _study.compared([1.0, 2.0, 3.0], [2.0, 1.0, 3.0]).endswith(": does not separate")
    assert _study.compared([float("inf"), 1.0], [1.0, 1.0]) == "diverges"


def test_what_diverges_stays_so() -> None:
    found = _study.trained(lambda step: [1.0, float("nan"), 0.1][step], 2)
    assert found == [1.0, float("inf"), float("inf")]
    assert _study.log_mean(found) == float("inf") and _study.last(found) == float("inf")
    assert _study.log_mean([5.0, 10.0, 1000.0]) == 2.0
