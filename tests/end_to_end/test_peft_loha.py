"""peft_type LOHA, in and out, against PEFT's own outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig
from safetensors.torch import load_file, save_file

from lorac.errors import ShapeMismatch, SiteUnsupported, UnsupportedField
from lorac.formats import load_adapter, save_adapter
from lorac.variants.base import Adapter
from lorac.variants.loha import LoHa
from tests import peft_files
from tests.end_to_end.peft_cases import Case
from tests.end_to_end.peft_parity import EMITTED, assert_back, assert_eager, assert_onnxruntime
from tests.zoo import ZOO


def _case(name: str, model: str, *targets: str, **settings: Any) -> Case:
    # PEFT rounds alpha/r to float32: quotients that are exact there leave float64 to decide.
    return Case(name, model, LoHaConfig(**{"r": 3, "alpha": 6, "target_modules": list(targets), **settings}))


CONV = ("stem", "grouped", "dilated", "line", "head")
CASES = (
    _case("patterns", "plain_mlp", "up", "head", rank_pattern={"up": 1}, alpha_pattern={"head": 9}),
    _case("conv", "plain_conv", *CONV, rank_pattern={"line": 2}),
    _case("effective", "plain_conv", *CONV, use_effective_conv2d=True, rank_pattern={"line": 2}),
    _case("linear", "tiny_llama", "q_proj", "down_proj", layers_to_transform=[0, 2]),
    _case("linear", "tiny_bert", "query", "value", "dense", exclude_modules=["pooler.dense"]),
    _case("single_taps", "resnet18", "conv2", "downsample.0", "fc", use_effective_conv2d=True),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_what_peft_computes(case: Case, tmp_path: Path) -> None:
    assert_eager(case, tmp_path)


@pytest.mark.parametrize("case", CASES[:-1], ids=lambda case: case.id)
def test_there_and_back(case: Case, tmp_path: Path) -> None:
    assert_back(case, tmp_path)


@pytest.mark.parametrize("mode", EMITTED)
def test_onnxruntime(mode: str, tmp_path: Path) -> None:
    assert_onnxruntime(CASES[2], tmp_path, mode)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = LoHaConfig(r=2, alpha=3, target_modules=["up", "head"], rank_dropout=0.25, module_dropout=0.5)
    inputs = ZOO["plain_mlp"].inputs()
    peft_files.make_peft(ZOO["plain_mlp"].fresh(), tmp_path / "f", config, inputs=inputs)
    return tmp_path / "f"


def test_what_the_fields_become(folder: Path, tmp_path: Path) -> None:
    adapter = load_adapter(folder)
    assert adapter.variant == LoHa(r=2, alpha=3, targets=adapter.variant.targets)
    save_adapter(adapter, tmp_path / "g")
    written = json.loads((tmp_path / "g" / "adapter_config.json").read_text())
    assert (written["rank_dropout"], written["module_dropout"]) == (0.25, 0.5)


@pytest.mark.parametrize(("name", "value"), [("r", 0), ("alpha", None), ("use_effective_conv2d", "yes")])
def test_wrong_fields(folder: Path, name: str, value: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(UnsupportedField, match=f"sets {name}="):
        load_adapter(folder)


def test_tensors_that_do_not_belong_together(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.up.hada_w2_b"]
    save_file(tensors, file)
    with pytest.raises(ShapeMismatch, match="'up' do not belong together"):
        load_adapter(folder)


@pytest.mark.parametrize(
    ("model", "path", "shape", "what"),
    [
        ("tiny_gpt2", "transformer.h.0.attn.c_attn", (144, 48), "GPT-2's Conv1D"),
        ("plain_mlp", "embed", (10, 23), "embedding"),
    ],
)
def test_what_peft_does_not_adapt(model: str, path: str, shape: tuple[int, int], what: str, tmp_path: Path) -> None:
    sides = {"a": torch.zeros(shape[0], 1), "b": torch.zeros(1, shape[1])}
    tensors = {f"hada_w{which}_{side}": value for which in "12" for side, value in sides.items()}
    adapter = Adapter("x", LoHa(r=1, targets=(path,)), {path: tensors})
    with pytest.raises(SiteUnsupported, match=f"LOHA does not adapt '{path}', which is {what}"):
        save_adapter(adapter, tmp_path / "x", model=ZOO[model].model())
