"""The rows of the table of releases, and the page that is made of their results."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from campaigns.version_table import (
    PYTHONS,
    TORCH,
    TRANSFORMERS,
    Row,
    count_tests,
    list_floors,
    list_rows,
    write_page,
)
from tests.campaigns.test_latest import REPORT

PROJECT = """
[project]
name = "it"
dependencies = ["numpy>=2.0", "torch>=2.11", "typer>=0.16"]
[project.optional-dependencies]
onnxruntime = ["onnx>=1.20"]
hf = ["it[onnxruntime]", "transformers>=4.57", "accelerate>=1.10", "huggingface_hub>=0.34"]
"""
SAID = "refused: capture needs transformers ≥ 5.24, found 5.16.1"


def test_lists_a_cell_for_each_combination() -> None:
    rows = [row for row in list_rows([]) if not row.title]
    assert len({row.key for row in rows}) == len(rows) == len(TORCH) * len(PYTHONS) * len(TRANSFORMERS)
    assert len({row.journal for row in list_rows([])}) == len(list_rows([]))


def test_lists_requirements_of_a_project() -> None:
    assert list_floors(PROJECT, "onnxruntime", "hf") == [
        "numpy>=2.0",
        "typer>=0.16",
        "onnx>=1.20",
        "huggingface_hub>=0.34",
    ]


def test_counts_passed_and_failed_tests() -> None:
    assert count_tests(REPORT) == {"passed": 1, "failed": ["tests.a::one", "tests.b::three", "tests.b::four"]}


def test_writes_each_sentence_once_and_marks_faults() -> None:
    rows = [
        Row("2.11", "3.11", (f"transformers=={release}.*",), ("tests/ir",) if release == "5.24" else ())
        for release in TRANSFORMERS
    ]
    beside = Row("2.13", "3.11", (), pins=("torch==2.14.*",), title="another library")
    results = {
        rows[0].key: {"steps": {"eager": "right", "emit": SAID}},
        rows[1].key: {"steps": {"eager": "right", "emit": SAID}},
        rows[2].key: {
            "steps": {"eager": "WRONG: off by 1"},
            "tests": {"passed": 3, "failed": ["tests.a::b"]},
        },
        beside.key: {"steps": {"eager": "right"}, "versions": {"torch": "2.14.1"}, "resolves": False},
    }
    page = write_page([*rows, beside], results)
    wrong = "0 right, **1 WRONG** (b) | 3 passed, **1 failed**: tests.a::b"
    assert f"| 2.11 | 3.11 | 1 right, 1 refused (a) | 1 right, 1 refused (a) | {wrong} |" in page
    assert page.count(SAID) == 1
    assert "| another library | torch 2.14.1 | **does not resolve** | 1 right |" in page


@pytest.mark.medium("the table runs it with every release", keep=["eager"])
@pytest.mark.parametrize("step", ["eager", "merge into a tied embedding", "transformers, training"])
def test_job_finds_a_step_right(step: str) -> None:
    done = subprocess.run([sys.executable, "-m", "campaigns.job", step], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["steps"] == {step: "right"}
