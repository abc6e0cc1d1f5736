"""The counts of PEFT's types that docs/peft.md has: of cases by their outcomes, and of code lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest

from campaigns import peft_types
from docs import make_peft
from lorac.formats.peft import config

CASES: list[tuple[str, Any, tuple[Any, dict[str, Any]]]] = [
    (f"{number} Small", None, (kind, {})) for number, kind in enumerate([*[peft.LoraConfig] * 3, *[peft.IA3Config] * 3])
]
KNOWN = {
    "0 Small": "right: {'eager': 1e-07, 'onnxruntime': 2e-07, 'back': 0.0}",
    "1 Small": "right: {'eager': 3e-07, 'onnxruntime': \"refused: 'lin1' is of kind x\", 'back': 0.0}",
    "2 Small": "refused: adapter 'a' has no place at 'lin0'",
    "3 Small": "PEFT: ImportError",
    "4 Small": "wrong: {'eager': nan}",
    "5 Small": "rounding: {'eager': 2e-3}",
}


def test_counts_every_outcome() -> None:
    counts = peft_types.count_cases(KNOWN, CASES)
    assert counts["LORA"] == {
        "cases": 3,
        "right": {"eager": 2, "onnxruntime": 1, "back": 2},
        "largest": {"eager": 3e-07, "onnxruntime": 2e-07, "back": 0.0},
        "refused": {"onnxruntime: '…' is of kind x": 1, "eager: adapter '…' has no place at '…'": 1},
        "unbuilt": {},
        "rounding": [],
        "wrong": [],
    }
    assert counts["IA3"]["unbuilt"] == {"ImportError": 1}
    assert counts["IA3"]["wrong"] == ["4 Small: {'eager': nan}"]
    assert counts["IA3"]["rounding"] == ["5 Small: {'eager': 2e-3}"]
    section = make_peft.cases_section({"peft": "1.0", "types": counts})
    assert (
        "the 6 `TEST_CASES` of PEFT 1.0" in section
        and "2 right, 1 refused by name, 1 not built by PEFT, 1 within four roundings of the output alone, 1 wrong"
        in section
    )
    assert "| LORA | 3 | 2 (≤ 3e-07) | 1 (≤ 2e-07) | 2 (≤ 0e+00) | 1 |" in section
    assert "- LORA, 1 of 3: ONNX Runtime alone: '…' is of kind x" in section


def test_rejects_a_case_without_an_outcome() -> None:
    with pytest.raises(KeyError, match="0 Small"):
        peft_types.count_cases({}, CASES)


def test_counts_the_lines_of_every_type() -> None:
    lines = peft_types.count_lines(config.peft_types())
    assert lines.keys() == config.peft_types().keys()
    assert all(one["formula"] > 0 and one["rules"] > 0 for one in lines.values())
    assert (
        len(peft_types.code_lines('"""Text."""\nimport os\n\n# why\n\ndef f():\n    """Say."""\n    return 1\n')) == 2
    )


def test_writes_a_part_next_to_the_other(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    peft_types.write("lines", {"a": 1}, record)
    peft_types.write("cases", {"b": 2}, record)
    assert json.loads(record.read_text()) == {"lines": {"a": 1}, "cases": {"b": 2}}


def test_the_page_has_every_case_of_every_type_that_peft_tries() -> None:
    record = json.loads(peft_types.RECORD.read_text())
    assert record["lines"].keys() == config.peft_types().keys()
    assert record["cases"]["types"].keys() <= config.peft_types().keys()
    assert not any(found["wrong"] for found in record["cases"]["types"].values())


def test_every_place_of_the_contract_has_a_type() -> None:
    section = make_peft.contract_section({"LORA": {"formula": 3, "rules": 4}, "IA3": {"formula": 1, "rules": 2}})
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert len(rows) == len(make_peft.PLACES)
    assert [row for row in rows if row.endswith("|  |")] == []
    assert "The median is **5**." in section
