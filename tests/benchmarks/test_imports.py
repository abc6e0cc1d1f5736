"""Imports during a measurement are counted apart: the outermost, and those that load something."""

import importlib
import sys
from types import SimpleNamespace

import pytest

from benchmarks._imports import Imports


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Two modules, the first of which loads the second, and a clock that stands still but for a second in each."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setitem(sys.modules, "a_clock", clock)
    (tmp_path / "loaded_first.py").write_text("import a_clock\nimport loaded_second\na_clock.now += 1\n")
    (tmp_path / "loaded_second.py").write_text("import a_clock\na_clock.now += 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield clock
    for name in ("loaded_first", "loaded_second"):
        sys.modules.pop(name, None)


def load_by_statement():
    import loaded_first  # noqa: F401  (it is loaded to see how long that takes)


def load_by_call():
    importlib.import_module("loaded_first")


@pytest.mark.parametrize("load", [load_by_statement, load_by_call])
def test_modules_are_counted_once_however_they_are_loaded(modules, load):
    imports, own = Imports(lambda: modules.now), __import__
    with imports.counted():
        load()
        modules.now += 5
        load()
    assert imports.seconds == 2
    assert __import__ is own


def test_counts_modules_after_one_that_fails_to_load(modules):
    imports = Imports(lambda: modules.now)
    with imports.counted():
        with pytest.raises(ImportError):
            importlib.import_module("loaded_never")
        load_by_call()
    assert imports.seconds == 2
