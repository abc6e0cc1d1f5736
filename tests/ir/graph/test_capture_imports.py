"""A capture imports no models: transformers' exporter patches only those that are imported."""

import sys

import pytest
from transformers.exporters import (
    exporter_dynamo,  # noqa: F401  (it registers what is patched)
    utils,
)

from tests.captured import captured_program
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
    found = utils.import_dotted_path
    captured_program(model)
    assert utils.import_dotted_path is found
    assert not [name for name in asked.names if name.startswith("transformers.models.")]


@pytest.mark.medium("test_models_that_are_not_imported_stay_so")
def test_models_that_are_here_are_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def patched(forward):
        made.append(forward)
        return forward

    path = "transformers.models.llama.modeling_llama.LlamaModel"
    monkeypatch.setitem(utils._PATCHES, "dynamo", [*utils._PATCHES["dynamo"], (path, "forward", patched)])
    captured_program(tiny_llama(layers=1))
    assert len(made) == 1
