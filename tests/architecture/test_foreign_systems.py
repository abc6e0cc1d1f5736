"""Faults on Windows and macOS, found on Linux: in the sources, and in a process without the modules that they lack."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.foreign_system import POSIX_MODULES, POSIX_NAMES, ROOT

SOURCES = sorted((ROOT / "lorac").rglob("*.py"))
ALIASES = {f"{module.__name__}.{name}" for module, names in POSIX_NAMES.items() for name in names.split()}
GUARDED = {
    "lorac/backends/tensorrt/plan_cache.py": {"os.geteuid"},
    "lorac/backends/onnxruntime/inference_session.py": {"mmap.MADV_DONTNEED"},
    "lorac/runtime/slot_images.py": {"os.preadv", "os.pwritev"},
    "lorac/serving/store/reading_main.py": {"resource", "os.fork", "os.nice"},
    "lorac/serving/store/reading_process.py": {"os.killpg"},
    "lorac/storage/atomic_folders.py": {"fcntl"},
    "lorac/storage/bounded_run.py": {"os.sysconf"},
}
"""Names that a system lacks, used behind a question for the system."""


def _used(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from [node.module or "", *(f"{node.module}.{each.name}" for each in node.names)]
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def test_uses_names_that_a_system_lacks_in_known_places_alone() -> None:
    found = {}
    for path in SOURCES:
        names = {name for name in _used(ast.parse(path.read_text("utf-8"))) if name in ALIASES | POSIX_MODULES}
        if names:
            found[path.relative_to(ROOT).as_posix()] = names
    assert found == GUARDED


def test_reads_and_writes_texts_as_utf_8_on_every_system() -> None:
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            name = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
            if name not in ("read_text", "write_text"):
                continue
            words = ast.unparse(node)
            if not re.search(r"encoding=|'(utf-8|ascii)'", words):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {words}")
    assert found == []


def test_starts_no_process_by_multiprocessing() -> None:
    """Its default start differs between systems, and a fork of a process with threads may hang."""
    words = ("multiprocessing", "ProcessPoolExecutor", "torch.multiprocessing")
    assert [path for path in SOURCES if set(words) & set(_used(ast.parse(path.read_text("utf-8"))))] == []


@pytest.mark.medium("the tests of sources above")
@pytest.mark.parametrize("system", ["win32", "darwin"])
@pytest.mark.parametrize("job", ["save_and_load", "take_uploads"])
def test_imports_every_module_and_keeps_files(job: str, system: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.foreign_system", system, "tests.foreign_jobs", job, os.fspath(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_prints_letters_that_a_code_page_lacks() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    command = [sys.executable, "-m", "lorac", "variants"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="cp1252", check=False)
    assert done.returncode == 0, done.stderr
    assert "\\u03a3" in done.stdout and done.stderr == ""
