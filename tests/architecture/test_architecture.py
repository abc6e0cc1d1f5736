"""Layout, direction and cost of the package, read off its sources."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lorac"
SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_dependencies_point_inward():
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([tool, "--no-cache"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_readable(source):
    lines = source.read_text().splitlines()
    assert len(lines) <= 400, f"{len(lines)} lines: split it"
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = _code_lines(node)
            assert length <= 40, f"{node.name} has {length} lines: take a step out"


def _code_lines(node):
    """Lines of a function without its signature and docstring, which may be as long as they need."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_says_what_it_is(source):
    tree = ast.parse(source.read_text())
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_shared_code_names_no_method():
    """Passes, backends and runtime know the forms; a method's name in them would be a special case."""
    from lorac.variants import variants

    methods = {v.__name__ for v in variants().values() if v.__module__.startswith("lorac.")}
    # Names in code; docstrings and comments may say who an algorithm comes from.
    for source in [s for s in SOURCES if s.relative_to(PACKAGE).parts[0] in {"passes", "backends", "runtime", "ir"}]:
        names = {n.id for n in ast.walk(ast.parse(source.read_text())) if isinstance(n, ast.Name)}
        assert not names & methods, f"{source.relative_to(ROOT)} names {names & methods}"


def test_no_machine_path_in_the_sources():
    for source in SOURCES:
        assert not re.search(r"/(home|work|root|Users)/", source.read_text()), source
