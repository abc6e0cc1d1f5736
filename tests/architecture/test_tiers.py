"""The lists of medium and slow tests name what is there, and say what finds the fault before."""

import re

import pytest

from tests.sources import ROOT
from tests.tiers import TIERS, read_moved


def _functions(file):
    source = ROOT / "tests" / file
    return re.findall(r"^def (\w+)", source.read_text(), re.MULTILINE) if source.exists() else []


@pytest.mark.parametrize("tier", TIERS)
def test_rows_name_tests_that_are_there(tier):
    named = {(file, row.test.partition("[")[0].rstrip("*")) for file, rows in read_moved(tier).items() for row in rows}
    found = {file: _functions(file) for file, _ in named}
    assert sorted((file, test) for file, test in named if not any(name.startswith(test) for name in found[file])) == []


@pytest.mark.parametrize("tier", TIERS)
def test_what_finds_the_fault_before_is_there_and_does_not_wait_itself(tier):
    """A test that a row names, or a file."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    tests = {name for file in files for name in re.findall(r"def (test_\w+)", file.read_text())}
    rows = [row for rows in read_moved(tier).values() for row in rows]
    said = {name for row in rows for name in re.findall(r"test_\w+(?:\.py)?", row.instead)}
    assert sorted(said - tests - {file.name for file in files} - {file.stem for file in files}) == []
    assert sorted(said & {row.test.rstrip("*") for row in rows if not row.keep}) == []
