"""The page of benchmarks is made from runs, with their machine and versions."""

import functools
import json
import subprocess

import pytest

from docs.make_benchmarks import ages, mark, page

RUN = {
    "benchmark": "swap",
    "revision": "0123456789ab",
    "rooms": ["lorac/runtime"],
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
    measured = "Revision `0123456789ab`; a processor, 2 cores; torch 2.13, lorac 0.1; `smoke=False`, `layers=20`; 61 s."
    assert lines[-3:-1] == [measured, ""]


def test_a_table_older_than_its_rooms_is_marked(tmp_path, monkeypatch):
    """Of two commits: a run at the first, one at the second, and one at a commit that nobody has."""
    monkeypatch.setattr("docs.make_benchmarks.ROOT", tmp_path)
    git = functools.partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True, check=True)
    git(["git", "init"])
    for room in ("lorac", "docs"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "new").touch()
        git(["git", "add", room])
        git(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--message", room])
    second, first = git(["git", "rev-list", "HEAD"]).stdout.split()
    for name, revision, room in (
        ("swap", first, "docs"),
        ("rows", first, "lorac"),
        ("peers", second, "docs"),
        ("train", "0" * 40, "docs"),
    ):
        run = {**RUN, "benchmark": name, "revision": revision, "rooms": [room]}
        (tmp_path / f"{name}.json").write_text(json.dumps(run))
    assert [*ages(tmp_path)] == ["swap"]
    text = mark(page(tmp_path), tmp_path)
    assert "\n## swap\n\n*Older than the code: later commits (1) touch `docs`.*\n" in text
    assert text.count("Older than the code") == 1


def test_no_runs_no_page(tmp_path):
    with pytest.raises(SystemExit, match="no runs"):
        page(tmp_path)
