"""Every code block of every page runs, in the order of the page, in an empty folder."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest

from tests.docs.pages import PAGES, ROOT, blocks, name

FILES = ROOT / "docs" / "without-lorac.md"
"""Its blocks are files of their own, which ``tests/end_to_end/test_without_lorac.py`` writes down and runs."""
SPOKEN = [page for page in PAGES if any(block.language in ("python", "sh") for block in blocks(page))]
MAKE = re.compile(r"(?:^|`)make ([a-z-]+)", re.MULTILINE)
EXTRA = re.compile(r"lorac\[(\w+)\]")


@pytest.mark.parametrize("page", SPOKEN, ids=name)
def test_python_parses(page):
    for block in blocks(page):
        if block.language == "python":
            ast.parse("\n" * (block.line - 1) + block.text, name(page))


def test_make_targets_and_extras_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    code = "\n".join(found for text in texts for found in re.findall(r"```.*?```|`[^`]+`", text, re.DOTALL))
    assert len(MAKE.findall(code)) > 5, "the pattern is wrong"
    assert set(MAKE.findall(code)) <= targets
    assert set(EXTRA.findall(code)) <= extras


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in SPOKEN if page != FILES], ids=name)
def test_the_blocks_of_every_page_run(page, tmp_path):
    """Python blocks share one process, as a reader's session would; shell blocks run where they stand between them."""
    steps = [(block.language, block.text, block.line) for block in blocks(page) if block.language in ("python", "sh")]
    given = tmp_path / "steps.json"
    given.write_text(json.dumps([str(page), *steps]))
    folder = tmp_path / "empty"
    folder.mkdir()
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    runner = ROOT / "tests" / "docs" / "reader.py"
    command = [sys.executable, str(runner), str(given)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.medium("report/test_explain.py, whose goldens are of the same texts; test_python_parses reads the page")
def test_the_readme_shows_the_output_of_its_code(tmp_path, monkeypatch, capsys):
    """In this process; in one of its own it is run with the other pages."""
    first = list(blocks(ROOT / "README.md"))
    code = next(block.text for block in first if block.language == "python")
    shown = next(block.text for block in first if block.language == "text")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr().out == shown
