"""The campaign of methods on further targets: outcomes, the journal, and the table."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import lorac
from campaigns import conformance


def _raise(error: Exception) -> None:
    raise error


def test_classifies_checks_and_survives_those_that_end_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {
        "lora linear aoti live": lambda: None,
        "vera linear aoti live": lambda: _raise(lorac.Unavailable("no op x", next_step="take y")),
        "dora linear aoti live": lambda: _raise(AssertionError("off by 3")),
        "ia3 linear aoti live": lambda: _raise(KeyError("x")),
        "oft linear aoti merged": lambda: os._exit(7),
    }
    monkeypatch.setattr(conformance, "methods", lambda only: ["all"])
    monkeypatch.setattr(conformance, "checks", lambda method, targets, everywhere: runs)
    with pytest.raises(SystemExit) as end:
        conformance.main(["--journal", str(tmp_path / "it.jsonl"), "--target", "openvino"])
    assert end.value.code
    records = [json.loads(line) for line in (tmp_path / "it.jsonl").read_text().splitlines()]
    assert [record["outcome"] for record in records] == ["right", "refused", "wrong", "untyped", "untyped"]
    printed = capsys.readouterr().out
    assert "vera linear aoti live: refused: no op x\n  take y" in printed
    assert "ends the process (7)" in printed and "5 methods, 5 checks" in printed
    with pytest.raises(SystemExit):
        conformance.main(["--journal", str(tmp_path / "it.jsonl"), "--target", "openvino", "--check", "live"])
    assert len((tmp_path / "it.jsonl").read_text().splitlines()) == 5  # the journal has them
    assert "4 methods, 4 checks" in capsys.readouterr().out


@pytest.mark.medium("conformance/test_variants.py runs the checks")
def test_runs_the_checks_of_a_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = ["--only", "lora", "--check", "live", "--target", "onnxruntime", "--journal", str(tmp_path / "it.jsonl")]
    with pytest.raises(SystemExit) as end:
        conformance.main(told)
    assert not end.value.code
    assert "lora linear onnxruntime live: right" in capsys.readouterr().out


def test_names_checks_by_method_host_target_and_check() -> None:
    assert [*conformance.checks("lora", ["openvino"], everywhere=False)] == [
        "lora linear openvino live",
        "lora linear openvino merged",
    ]
    assert {*conformance.methods(["lora", "ln_tuning", "chain"])} == {"lora", "chain"}
