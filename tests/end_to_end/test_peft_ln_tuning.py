"""peft_type LN_TUNING, in and out, against PEFT's own outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LNTuningConfig
from safetensors.torch import load_file, save_file

from lorac.errors import CorruptFile, UnsupportedField, UnusedTensors
from lorac.formats import load_adapter
from lorac.variants.ln_tuning import LNTuning
from tests import peft_files
from tests.end_to_end.peft_cases import Case
from tests.end_to_end.peft_parity import EMITTED, assert_back, assert_eager, assert_onnxruntime
from tests.zoo import ZOO

pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT asks every norm for its features


def _case(name: str, model: str, targets: Any, **settings: Any) -> Case:
    return Case(name, model, LNTuningConfig(target_modules=targets, **settings))


CASES = (
    _case("norms", "tiny_llama", ["input_layernorm", "post_attention_layernorm", "norm"]),
    _case("norms", "tiny_bert", ["LayerNorm"], modules_to_save=["classifier"]),
    _case("pattern", "tiny_gpt2", r".*ln_[12f]", exclude_modules=["h.0.ln_1"]),
    _case("buffers", "resnet18", ["bn1"]),
    _case("linears", "plain_mlp", ["up", "head"]),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_what_peft_computes(case: Case, tmp_path: Path) -> None:
    assert_eager(case, tmp_path)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_there_and_back(case: Case, tmp_path: Path) -> None:
    assert_back(case, tmp_path)


@pytest.mark.parametrize("mode", EMITTED)
def test_onnxruntime(mode: str, tmp_path: Path) -> None:
    assert_onnxruntime(CASES[1], tmp_path, mode)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = LNTuningConfig(target_modules=["LayerNorm"])
    model = ZOO["tiny_bert"].fresh(torch.float64)
    peft_files.make_peft(model, tmp_path / "f", config, inputs=ZOO["tiny_bert"].inputs())
    return tmp_path / "f"


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_the_fields_become(folder: Path) -> None:
    assert load_adapter(folder).variant == LNTuning(targets=("LayerNorm",))


def test_modules_that_are_not_targeted(folder: Path) -> None:
    configure(folder, exclude_modules=["bert.embeddings.LayerNorm"])
    with pytest.raises(UnusedTensors, match="LN_TUNING accounts for 2 tensors"):
        load_adapter(folder)


@pytest.mark.parametrize(("name", "value"), [("target_modules", None), ("target_modules", 3), ("exclude_modules", [1])])
def test_wrong_fields(folder: Path, name: str, value: object) -> None:
    configure(folder, **{name: value})
    with pytest.raises(UnsupportedField, match=f"sets {name}="):
        load_adapter(folder)


def test_a_file_that_is_incomplete(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: t for name, t in tensors.items() if "embeddings" not in name}, file)
    with pytest.raises(CorruptFile, match=r"lacks tensors.*bert\.embeddings\.LayerNorm"):
        load_adapter(folder, ZOO["tiny_bert"].model())
    save_file({}, file)
    with pytest.raises(CorruptFile, match="no tensor of its method"):
        load_adapter(folder)
