"""The sweep over all ways of training skips recorded runs, and the page of families lists every way once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments import __main__ as runner
from experiments._lora_variants import LORA, count_values, ways
from experiments._reader import count_trained
from experiments._runs import Run, Runs
from experiments._study import CHOOSERS, CHOOSING
from experiments._taxonomy import FAMILIES, write_page
from experiments.lorafactory import AT_LORAS, BEST, RATES, TIME, VALUES, best_rates


def test_skips_runs_that_are_recorded(tmp_path: Path) -> None:
    kept, done = tmp_path / "runs.jsonl", Run("lora", 0.01, 0, 1)
    kept.write_text(json.dumps([done, [2.5, 0.1]]) + "\n", encoding="utf-8")
    runs = Runs(kept)
    runs.ask([done])
    assert runs.losses("lora", 0.01, [0], 1) == [2.5]
    assert kept.read_text(encoding="utf-8").count("\n") == 1


@pytest.mark.parametrize("place", [0, 5, len(RATES) - 1])
def test_rates_are_tried_until_the_best_lies_between_two(place: int) -> None:
    runs = Runs(None)
    runs.done = {
        Run("lora", rate, CHOOSING + chooser, 1): (abs(index - place), 0.0)
        for index, rate in enumerate(RATES)
        for chooser in range(CHOOSERS)
    }
    assert best_rates(runs, ["lora"], 1, range(4, 7)) == {"lora": RATES[place]}


def test_each_way_has_one_family() -> None:
    placed = [name.rstrip("*") for names in FAMILIES.values() for name in names]
    assert len(placed) == len({*placed})
    assert {*placed} <= {*ways()}, "the others are other forms"


def test_values_are_counted_as_compiling_counts_them() -> None:
    for name in ("vblora", "dora", "LoRA-SB"):
        assert count_values(ways()[name].method) == count_trained(ways()[name].method)
    assert count_values(LORA) == count_values(ways()["lora"].method)


@pytest.mark.medium("the other pages of experiments")
def test_the_page_marks_methods_that_differ_from_lora(tmp_path: Path, monkeypatch: Any) -> None:
    losses = {name: [2.0, 2.1, 2.2] for name in ways()} | {"dora": [1.0, 1.1, 1.21]}
    ones = {name: [1.0] for name in ways()}
    tables = [
        {"title": title, "scores": scores, "rates": dict.fromkeys(ways(), 0.01)}
        for title, scores in {BEST: losses, AT_LORAS: losses, VALUES: ones, TIME: ones}.items()
    ]
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    (tmp_path / "lorafactory.json").write_text(json.dumps({"tables": tables, "steps": 1, "seeds": 3}), encoding="utf-8")
    write_page(tmp_path / "page.md")
    rows = [line for line in (tmp_path / "page.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(ways())
    assert [row for row in rows if "**" in row] == [row for row in rows if "| dora |" in row]


def test_the_page_stays_where_single_scores_are_lost(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    tables = [{"title": title, "scores": {}, "rates": {}} for title in (BEST, AT_LORAS, VALUES, TIME)]
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    (tmp_path / "lorafactory.json").write_text(json.dumps({"tables": tables, "steps": 1, "seeds": 3}), encoding="utf-8")
    write_page(tmp_path / "page.md")
    assert not (tmp_path / "page.md").exists()
    assert "lorafactory --again" in capsys.readouterr().out
