"""Every experiment runs, tiny, on the path of the full run; and verdicts tell differences from noise."""

from __future__ import annotations

import argparse
import json
import math
import random
import runpy
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments import __main__ as runner
from experiments import _kept, _study
from experiments._finding import AT_EDGE, CONTRARY, NOT_MET, NOT_SHOWN, SHOWN, Expected, Finding, Table
from experiments._statistics import detectable, interval
from experiments._study import Question, answer, last


@pytest.mark.medium("test_docstrings_give_claim_source_and_command imports each")
@pytest.mark.parametrize("name", runner.NAMES)
def test_runs_and_gives_a_verdict(name: str, capsys: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--smoke", "--json", str(tmp_path / "result.json")])
    monkeypatch.delitem(sys.modules, f"experiments.{name}", raising=False)  # runpy warns of a module that was imported
    runpy.run_module(f"experiments.{name}", run_name="__main__")
    said = capsys.readouterr().out
    assert "2 seeds, 2 steps" in said
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    verdict = runner.find(name, result).verdict
    assert f"verdict: {verdict}" in said
    assert verdict in {SHOWN, NOT_SHOWN, CONTRARY}
    assert runner.details(name, result).startswith(f"## {name}\n")


@pytest.mark.parametrize("name", runner.NAMES)
def test_docstrings_give_claim_source_and_command(name: str) -> None:
    experiment, text = runner.load(name), sys.modules[f"experiments.{name}"].__doc__ or ""
    assert experiment.claim.endswith(".") and "arXiv" in experiment.source
    assert f"python -m experiments.{name} [--seeds {experiment.seeds}] [--steps {experiment.steps}] [--smoke]" in text
    assert experiment.fails_by and not experiment.fails_by.endswith(".")


# ── Verdicts ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def judge(low: str | float, high: str | float, stated_by: str = "table 3") -> str:
    scores = {"low": [1.0, 1.1, 1.2], "high": [2.0, 2.1, 2.3], "near": [1.0, 1.2, 1.1], "at edge": [0.1, 0.1, 0.1]}
    one = Expected("t", low, high, stated_by)
    return Finding([Table("t", "loss", scores, edges=["at edge"])], [one]).judge(one)


def test_a_line_is_contrary_only_where_the_paper_states_it() -> None:
    assert judge("low", "high") == judge("low", 1.5) == judge(1.5, "high") == SHOWN
    assert judge("low", "near") == NOT_SHOWN
    assert judge("high", "low") == CONTRARY
    assert judge("high", "low", "us") == NOT_MET
    assert judge("at edge", "high") == judge("high", "at edge") == AT_EDGE


def test_the_verdict_is_of_the_lines_that_the_paper_states() -> None:
    table = Table("t", "loss", {"low": [1.0, 1.1, 1.2], "high": [2.0, 2.1, 2.3]})

    def verdict(*expected: Expected) -> str:
        return Finding([table], expected).verdict

    shown, ours, theirs = (
        Expected("t", "low", "high", "table 1"),
        Expected("t", "high", 1.5),
        Expected("t", "high", 1.5, "fig. 1"),
    )
    assert verdict(shown) == SHOWN
    assert verdict(shown, ours) == SHOWN
    assert verdict(ours) == NOT_SHOWN  # the paper states none
    assert verdict(shown, theirs) == CONTRARY


def test_a_line_names_its_source_and_its_power() -> None:
    table = Table("t", "loss", {"low": [1.0, 1.1, 1.3], "high": [2.0, 2.1, 2.2]})
    said = Finding([table], [Expected("t", "low", "high", "table 3")]).describe()
    assert "t: low below high? -0.97 (95 %: -1.1 to -0.82): shown (stated by table 3; 3 seeds see 0.18)" in said


@pytest.mark.parametrize(
    ("high", "said"), [([2.0, 2.1, 2.2], "shown (stated"), ([1.2, 1.4, 1.45], "shown, narrowly (")]
)
def test_a_line_that_another_rounding_may_turn_is_marked(high: list[float], said: str) -> None:
    table = Table("t", "loss", {"low": [1.0, 1.1, 1.3], "high": high})
    assert said in Finding([table], [Expected("t", "low", "high", "table 3")]).describe()


def test_so_many_seeds_separate_the_difference_that_is_stated_four_times_out_of_five() -> None:
    drawn, found = random.Random(0), []
    for _ in range(2000):
        own = [drawn.gauss(0, 1) for _ in range(5)]
        low, high = interval(own, [0.0] * 5)
        found.append(detectable(low, high, 5))
    size = statistics.fmean(found)
    apart = [interval([drawn.gauss(-size, 1) for _ in range(5)], [0.0] * 5)[1] < 0 for _ in range(2000)]
    assert 0.75 < statistics.fmean(apart) < 0.9
    assert detectable(1.0, 1.0, 1) == detectable(float("-inf"), float("inf"), 5) == 0.0


def test_ranks_a_diverged_side_last() -> None:
    table = Table("t", "loss", {"fine": [1.0, 1.0], "diverged": [float("inf"), 1.0]})
    assert Finding([table], [Expected("t", "fine", "diverged", "fig. 1")]).verdict == SHOWN
    assert Finding([table], [Expected("t", "diverged", "fine", "fig. 1")]).verdict == CONTRARY


def test_judges_a_run_whose_single_scores_are_lost_by_its_intervals() -> None:
    table, line = Table("t", "loss", {}, means={"low": [1.0, 0.1], "high": [2.0, 0.1]}), Expected("t", "low", "high")
    found = Finding([table], [line], {line.key: [-1.2, -0.8]}, 5)
    assert found.verdict == SHOWN
    assert "low " in found.describe() and "5 seeds see" in found.describe()


# ── Rates ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def tried(best: float, rates: Sequence[float]) -> Table:
    question = Question("t", {"side": lambda rate, seed, steps: [abs(math.log(rate / best))]}, rates, last, "loss")
    given = argparse.Namespace(seeds=2, steps=1, first=0, smoke=False)
    return answer([question], given)[0]


def test_a_best_rate_at_an_edge_is_looked_for_beyond_it() -> None:
    assert tried(1.0, (0.5, 1.0, 2.0)).rates == {"side": 1.0}
    above, below = tried(8.0, (0.5, 1.0, 2.0)), tried(0.125, (0.5, 1.0, 2.0))
    assert above.rates == {"side": 8.0} and below.rates == {"side": 0.125}
    assert not above.edges and not below.edges


def test_marks_a_side_whose_best_rate_stays_at_an_edge() -> None:
    assert tried(1e9, (0.5, 1.0, 2.0)).edges == ["side"]
    assert tried(1e9, (0.5,)).edges == []


# ── Results that are kept ────────────────────────────────────────────────────────────────────────────────────────────
MODULE = '''"""Text."""
from experiments._inner import used, unused
SIDE = 1
EXPECTED = [SIDE, "line"]
def find(given):
    """Text."""
    return used(SIDE), EXPECTED
EXPERIMENT = Experiment(claim="a claim", find=find, fails_by="")
main(EXPERIMENT)
'''
INNER = """def used(x):
    return helper(x)
def helper(x):
    return x
def unused(x):
    return x
"""


def code_of(module: str, inner: str, folder: Path, monkeypatch: Any) -> Any:
    (folder / "experiments").mkdir(exist_ok=True)
    (folder / "experiments/mine.py").write_text(module, encoding="utf-8")
    (folder / "experiments/_inner.py").write_text(inner, encoding="utf-8")
    monkeypatch.setattr(_kept, "ROOT", folder)
    for cached in (_kept._tree, _kept._definitions, _kept._imports):
        cached.cache_clear()
    found = _kept.computing_code("experiments.mine")
    for cached in (_kept._tree, _kept._definitions, _kept._imports):
        cached.cache_clear()
    return found


def test_a_result_is_valid_until_code_changes_that_computes_it(tmp_path: Path, monkeypatch: Any) -> None:
    code = code_of(MODULE, INNER, tmp_path, monkeypatch)
    assert {name for _, name in code} >= {"find", "SIDE", "used", "helper"} and "unused" not in {n for _, n in code}
    for module, inner in (
        (MODULE.replace("Text.", "Other text."), INNER),
        (MODULE.replace("a claim", "another"), INNER),
        (MODULE.replace('"line"', '"other line"'), INNER),
        (MODULE, INNER.replace("def unused(x):\n    return x", "def unused(x):\n    return 2 * x")),
    ):
        assert code_of(module, inner, tmp_path, monkeypatch) == code
    for module, inner in (
        (MODULE.replace("SIDE = 1", "SIDE = 2"), INNER),
        (MODULE, INNER.replace("def helper(x):\n    return x", "def helper(x):\n    return 2 * x")),
    ):
        assert code_of(module, inner, tmp_path, monkeypatch) != code


def test_a_fault_is_put_in_and_taken_out() -> None:
    able = [name for name in runner.NAMES if runner.load(name).fault is not None]
    assert able
    for name in able:
        fault = runner.load(name).fault
        assert fault is not None and fault.text
        with fault.put():
            pass


def test_every_result_has_the_lines_that_are_expected() -> None:
    for name in runner.NAMES:
        if (result := runner.kept(name)) is not None:
            assert runner.find(name, result).describe()


def test_keeps_infinity_after_a_nan() -> None:
    found = _study.trained(lambda step: [1.0, float("nan"), 0.1][step], 2)
    assert found == [1.0, float("inf"), float("inf")]
    assert _study.log_mean(found) == float("inf") and _study.last(found) == float("inf")
    assert _study.log_mean([5.0, 10.0, 1000.0]) == 2.0
