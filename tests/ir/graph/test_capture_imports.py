"""A capture imports no models: transformers' exporter patches only those that are imported."""

import importlib
import re
import sys

import pytest
from transformers.exporters import (
    exporter_dynamo,  # noqa: F401  (it registers what is patched)
    utils,
)

import lorac
from tests.captured import captured_program
from tests.refusing import refuses
from tests.zoo import tiny_llama

ABSENT = "transformers.models.of_nobody.modeling_of_nobody"


class Asked:
    """An import finder that finds nothing, and records the names."""

    def __init__(self):
        self.names = []

    def find_spec(self, name, *_):
        self.names.append(name)


def test_models_that_are_not_imported_stay_so(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, model = Asked(), tiny_llama(layers=1)
    monkeypatch.setattr(sys, "meta_path", [asked, *sys.meta_path])
    patches = [*utils._PATCHES["dynamo"], (f"{ABSENT}.Model", "forward", lambda forward: forward)]
    monkeypatch.setitem(utils._PATCHES, "dynamo", patches)
    captured_program(model)
    assert not [name for name in asked.names if name.startswith("transformers.models.")]


@pytest.mark.medium("test_models_that_are_not_imported_stay_so")
def test_models_that_are_here_are_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    made, functions = [], dict(vars(utils))

    def patched(forward):
        assert vars(utils) == functions, "nothing of the exporter itself is replaced, not even during a trace"
        made.append(forward)
        return forward

    path = "transformers.models.llama.modeling_llama.LlamaModel"
    monkeypatch.setitem(utils._PATCHES, "dynamo", [*utils._PATCHES["dynamo"], (path, "forward", patched)])
    captured_program(tiny_llama(layers=1))
    assert len(made) == 1


def test_finds_the_owners_of_all_patches():
    """A capture looks owners up among imported modules and their attributes, and would miss any other."""
    for path in {owner for owner, _, _ in utils._PATCHES["dynamo"]}:
        module, _, name = path.rpartition(".")
        assert re.fullmatch(r"(torch|transformers)(\.[a-z]\w*)*(\.[A-Z]\w*)?", path), path
        if not path.startswith("transformers.models.") and name[0].isupper():
            assert vars(sys.modules[module])[name] is utils.import_dotted_path(path)


def test_rejects_transformers_without_the_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(layers=1)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.20.2")
    with refuses("unavailable", match="needs transformers ≥ 5.24, found 5.20.2"):
        lorac.compile(model, target="onnxruntime")


def test_rejects_generation_graphs_with_an_older_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A saved program may meet another release than the one that it was made with."""
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.23.0")
    monkeypatch.delitem(sys.modules, "lorac.runtime.generation.driver", raising=False)
    with refuses("unavailable", match="generation over a cache needs transformers ≥ 5.24, found 5.23.0"):
        importlib.import_module("lorac.runtime.generation.driver")
