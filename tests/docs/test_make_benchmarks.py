"""The page of benchmarks is made from runs, with their machine and versions."""

import json

import pytest

from docs.make_benchmarks import page

RUN = {
    "benchmark": "swap",
    "machine": {"cpu": "a processor", "cores": 2, "system": "Linux"},
    "versions": {"torch": "2.13", "lorac": "0.1"},
    "options": {"smoke": False, "layers": 20},
    "seconds": 61.2,
    "tables": [{"title": "Swaps", "columns": ["what", "ratio"], "rows": [["a|b", "1.02"]], "A/A": {"live": 1.004}}],
}


def test_the_page_shows_a_whole_run(tmp_path):
    (tmp_path / "swap.json").write_text(json.dumps(RUN))
    lines = page(tmp_path).splitlines()
    expected = ["## swap", "**Swaps**", "| what | ratio |", "| --- | --- |", "| a\\|b | 1.02 |", "A/A: live 1.004."]
    assert [line for line in expected if line not in lines] == []
    assert lines[-3:-1] == ["a processor, 2 cores; torch 2.13, lorac 0.1; `smoke=False`, `layers=20`; 61 s.", ""]


def test_no_runs_no_page(tmp_path):
    with pytest.raises(SystemExit, match="no runs"):
        page(tmp_path)
