"""Markers of tiers: their patterns select cases, their reasons are short and name tests that exist and run sooner."""

import ast
import re
import subprocess
import sys

import pytest

from tests.sources import ROOT
from tests.tiers import TIERS

WORDS = 12
"""The most words of a reason."""
FILES = {file: ast.parse(file.read_text()) for file in sorted((ROOT / "tests").rglob("test_*.py"))}
SUITE = """
import pytest

@pytest.mark.slow("a, b and c", keep=["[a]*", "b"])
@pytest.mark.medium("a", cases=["[a]-*"])
@pytest.mark.parametrize("case", ["[a]", "[a]-1", "b", "b1", "?"])
def test_cases(case):
    pass
"""


def _reasons(tier):
    """List the reasons that the tier's markers give."""
    calls = [node for tree in FILES.values() for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call.args[0].value for call in calls if ast.unparse(call.func) == f"pytest.mark.{tier}" and call.args]


def _is_in(decorators, tier):
    """Return whether all cases of a test with these decorators are in the tier."""
    return any(
        ast.unparse(mark).startswith(f"pytest.mark.{tier}") and not getattr(mark, "keywords", ()) for mark in decorators
    )


@pytest.mark.parametrize("tier", TIERS)
def test_reasons_are_short(tier):
    assert [reason for reason in _reasons(tier) if len(reason.split()) > WORDS] == []


@pytest.mark.parametrize("tier", TIERS)
def test_reasons_name_tests_that_exist_and_run_sooner(tier):
    tests = [node for tree in FILES.values() for node in tree.body if isinstance(node, ast.FunctionDef)]
    named = {name for reason in _reasons(tier) for name in re.findall(r"test_\w+(?:\.py)?", reason)}
    assert sorted(named - {test.name for test in tests} - {file.name for file in FILES}) == []
    assert sorted(named & {test.name for test in tests if _is_in(test.decorator_list, tier)}) == []


def _select(folder, source, expression):
    (folder / "test_suite.py").write_text(source)
    (folder / "conftest.py").write_text('pytest_plugins = ["tests.tiers"]')
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n  medium\n  slow\n")
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-m", expression, "."]
    done = subprocess.run(
        command, cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    return done.stdout


@pytest.mark.parametrize(("expression", "cases"), [("slow", ["b1", "?"]), ("medium and not slow", ["[a]-1"])])
def test_a_marker_takes_the_cases_of_its_patterns(tmp_path, expression, cases):
    found = re.findall(r"::test_cases\[(.*)\]", _select(tmp_path, SUITE, expression))
    assert found == cases


def test_rejects_a_pattern_that_matches_no_case(tmp_path):
    source = SUITE.replace('"b"]', '"b", "c"]')
    assert "test_cases: no case matches ['c'] of its marker 'slow'" in _select(tmp_path, source, "slow")
