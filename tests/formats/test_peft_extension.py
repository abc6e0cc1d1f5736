"""A PEFT type is one file: a subclass of PeftType in a module of lorac.formats.peft.types."""

import importlib
import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorac
from lorac.formats.peft import types
from lorac.formats.peft.config import peft_types
from lorac.testing import assert_close
from tests.peft_files import CONFIG, WEIGHTS

SOURCE = '''
"""PEFT type GATE: one factor per output, as (out,)."""

from lorac.formats._config_fields import Applied, read_pattern, write_pattern
from lorac.formats._site_layouts import matrix_site
from lorac.formats.peft.fields import WITHOUT_FAN
from lorac.formats.peft.peft_type import PeftType, take_tensors
from lorac.ir.sites.site import SiteKind
from lorac.variants.entrywise import IA3


class GateType(PeftType[IA3]):
    """GATE."""

    peft_type = "GATE"
    variants = {IA3: {"feedforward_modules": ()}}
    fields = {**WITHOUT_FAN, "feedforward_modules": Applied([], to="feedforward", read=read_pattern, write=list)}
    suffixes = ("gate",)
    kinds = frozenset({SiteKind.LINEAR})

    def read_site(self, variant, path, stored):
        gate = take_tensors(path, stored, {"gate": 1}, "gate is (out,)")["gate"]
        return matrix_site(path, len(gate), len(gate)), {"ia3_l": gate[:, None]}

    def write_site(self, variant, site, tensors):
        return {"gate": tensors["ia3_l"][:, 0]}
'''


@pytest.fixture
def gate_type(tmp_path):
    (tmp_path / "types").mkdir()
    (tmp_path / "types" / "gate.py").write_text(SOURCE)
    types.__path__.append(str(tmp_path / "types"))
    importlib.invalidate_caches()
    peft_types.cache_clear()
    yield
    types.__path__.pop()
    sys.modules.pop("lorac.formats.peft.types.gate", None)
    peft_types.cache_clear()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "gated"
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps({"peft_type": "GATE", "target_modules": ["0"]}))
    save_file({"base_model.model.0.gate": torch.arange(1.0, 7)}, folder / WEIGHTS)
    return folder


def test_a_type_from_outside_is_read_and_runs(gate_type, folder):
    model, x = torch.nn.Sequential(torch.nn.Linear(4, 6)), torch.randn(3, 4)
    compiled = lorac.compile(model, [folder])
    with torch.no_grad():
        assert_close(compiled(x), model(x) * torch.arange(1.0, 7))
    save_file({"base_model.model.0.gate": torch.ones(5)}, folder / WEIGHTS)
    with pytest.raises(lorac.AdapterError, match="has shape"):
        lorac.load_adapter(folder, model)


def test_rejects_the_type_without_its_file(folder):
    with pytest.raises(lorac.FormatError, match="unknown peft_type 'GATE'"):
        lorac.load_adapter(folder)


def test_writes_a_type_from_outside(gate_type, folder, tmp_path):
    lorac.save_adapter(lorac.load_adapter(folder), tmp_path / "again")
    assert json.loads((tmp_path / "again" / CONFIG).read_text())["peft_type"] == "GATE"
    assert torch.equal(load_file(tmp_path / "again" / WEIGHTS)["base_model.model.0.gate"], torch.arange(1.0, 7))
