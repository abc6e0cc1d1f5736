"""Imports inside what is measured are counted by themselves: the outermost, and those that load something."""

import importlib
import sys
import time

import pytest

from benchmarks._imports import Imports


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Two modules that are loaded for 0.1 s each, the first of which loads the second."""
    (tmp_path / "loaded_first.py").write_text("import time\nimport loaded_second\ntime.sleep(0.1)\n")
    (tmp_path / "loaded_second.py").write_text("import time\ntime.sleep(0.1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("loaded_first", "loaded_second"):
        sys.modules.pop(name, None)


def load_by_statement():
    import loaded_first  # noqa: F401  (it is loaded to see how long that takes)


def load_by_call():
    importlib.import_module("loaded_first")


@pytest.mark.parametrize("load", [load_by_statement, load_by_call])
def test_modules_are_counted_once_however_they_are_loaded(modules, load):
    imports, own = Imports(time.perf_counter), __import__
    with imports.counted():
        load()
        found = imports.seconds
        time.sleep(0.05)
        load()
    assert 0.2 <= found < 0.4
    assert imports.seconds == found
    assert __import__ is own


def test_a_module_that_fails_to_load_does_not_hide_those_behind_it(modules):
    imports = Imports(time.perf_counter)
    with imports.counted():
        with pytest.raises(ImportError):
            importlib.import_module("loaded_never")
        load_by_call()
    assert imports.seconds >= 0.2
