"""peft_type HIRA, in and out, against PEFT's own outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import HiraConfig
from safetensors.torch import load_file, save_file

from lorac.errors import ShapeMismatch, SiteUnsupported, UnsupportedField
from lorac.formats import load_adapter, save_adapter
from lorac.variants.base import Adapter
from lorac.variants.hira import HiRA
from tests import peft_files
from tests.end_to_end.peft_cases import Case
from tests.end_to_end.peft_parity import EMITTED, assert_back, assert_eager, assert_onnxruntime
from tests.zoo import ZOO


def _case(name: str, model: str, *targets: str, **settings: Any) -> Case:
    return Case(name, model, HiraConfig(**{"r": 3, "target_modules": list(targets), **settings}))


CASES = (
    _case("embedding", "plain_mlp", "embed", "up", "head", r=5),
    _case("saved", "plain_mlp", "up", modules_to_save=["head"]),
    _case("conv", "plain_conv", "stem", "dilated", "line", "head"),
    _case("linear", "tiny_llama", "q_proj", "down_proj", layers_to_transform=[0, 2]),
    _case("embedding", "tiny_llama", "embed_tokens", "v_proj"),
    _case("linear", "tiny_bert", "query", "value", "dense", exclude_modules=["pooler.dense"]),
    _case("conv1d", "tiny_gpt2", "c_attn", "c_proj", fan_in_fan_out=True),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_what_peft_computes(case: Case, tmp_path: Path) -> None:
    assert_eager(case, tmp_path)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_there_and_back(case: Case, tmp_path: Path) -> None:
    assert_back(case, tmp_path)


@pytest.mark.parametrize("mode", EMITTED)
def test_onnxruntime(mode: str, tmp_path: Path) -> None:
    assert_onnxruntime(CASES[0], tmp_path, mode)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = HiraConfig(r=2, target_modules=["up", "embed"], hira_dropout=0.25, rank_pattern={"up": 1})
    inputs = ZOO["plain_mlp"].inputs()
    peft_files.make_peft(ZOO["plain_mlp"].fresh(), tmp_path / "f", config, inputs=inputs)
    return tmp_path / "f"


def test_what_the_fields_become(folder: Path) -> None:
    variant = load_adapter(folder).variant
    assert sorted(variant.targets) == ["embed", "up"]
    assert variant == HiRA(r=2, dropout=0.25, targets=variant.targets)


def test_peft_ignores_its_rank_pattern(folder: Path, tmp_path: Path) -> None:
    """The fixture's configuration says rank 1 at up."""
    adapter = load_adapter(folder, ZOO["plain_mlp"].model())
    assert adapter.tensors["up"]["hira_A"].shape[0] == 2
    adapter.variant = HiRA(r=2, rank_pattern={"up": 1}, targets=("embed", "up"))
    tensors = adapter.tensors["up"]
    adapter.tensors["up"] = {"hira_A": tensors["hira_A"][:1], "hira_B": tensors["hira_B"][:, :1]}
    with pytest.raises(UnsupportedField, match="'up' is of rank 1 by rank_pattern, which PEFT's HIRA ignores"):
        save_adapter(adapter, tmp_path / "x", model=ZOO["plain_mlp"].model())


@pytest.mark.parametrize(("name", "value"), [("r", 0), ("hira_dropout", "0.1")])
def test_wrong_fields(folder: Path, name: str, value: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(UnsupportedField, match=f"sets {name}="):
        load_adapter(folder)


def test_tensors_that_do_not_belong_together(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.up.hira_B"] = torch.zeros(14, 3)
    save_file(tensors, file)
    with pytest.raises(ShapeMismatch, match=r"'up' do not belong together: hira_A \(2, 10\), hira_B \(14, 3\)"):
        load_adapter(folder)


def test_peft_refuses_groups(tmp_path: Path) -> None:
    model = ZOO["plain_conv"].model()
    tensors = {"hira_A": torch.zeros(2, 30), "hira_B": torch.zeros(8, 2)}
    adapter = Adapter("x", HiRA(r=2, targets=("grouped",)), {"grouped": tensors})
    with pytest.raises(SiteUnsupported, match="HIRA does not adapt 'grouped', which is conv2d of 2 groups"):
        save_adapter(adapter, tmp_path / "x", model=model)
