"""peft_type LOKR, in and out, against PEFT's own outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoKrConfig
from safetensors.torch import load_file, save_file

from lorac.errors import ShapeMismatch, SiteUnsupported, UnsupportedField, UnusedTensors
from lorac.formats import load_adapter, save_adapter
from lorac.variants.base import Adapter
from lorac.variants.lokr import LoKr
from tests import peft_files
from tests.end_to_end.peft_cases import Case
from tests.end_to_end.peft_parity import EMITTED, assert_back, assert_eager, assert_onnxruntime
from tests.zoo import ZOO


def _case(name: str, model: str, *targets: str, **settings: Any) -> Case:
    return Case(name, model, LoKrConfig(**{"r": 2, "alpha": 5, "target_modules": list(targets), **settings}))


KERNELS = ("stem", "grouped", "dilated", "head")
CASES = (
    _case("patterns", "plain_mlp", "up", "down", "head", rank_pattern={"up": 9}, alpha_pattern={"head": 2}),
    _case("both", "tiny_llama", "q_proj", "down_proj", decompose_both=True, layers_to_transform=[0, 2]),
    _case("factor", "tiny_bert", "query", "value", "dense", decompose_factor=4, exclude_modules=["pooler.dense"]),
    _case("lycoris", "tiny_bert", "query", "dense", init_weights="lycoris", r=1, decompose_both=True),
    _case("whole", "plain_conv", *KERNELS, r=8),
    _case("factored", "plain_conv", *KERNELS, "line", r=1),
    _case("effective", "plain_conv", *KERNELS, "line", use_effective_conv2d=True, decompose_both=True),
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
    assert_onnxruntime(CASES[0], tmp_path, mode)


def test_a_conv1d_with_a_whole_w2(tmp_path: Path) -> None:
    """Its rank is too high to factor w2, and PEFT multiplies (l, m) and (k, n, kw) along the wrong axes."""
    model, inputs = ZOO["plain_conv"].fresh(), ZOO["plain_conv"].inputs()
    config = LoKrConfig(r=8, target_modules=["line"])
    peft_files.make_peft(model, tmp_path / "f", config, inputs=inputs)
    for known in (model, None):
        with pytest.raises(UnsupportedField, match="'line' is a Conv1d with a whole lokr_w2"):
            load_adapter(tmp_path / "f", known)
    tensors = {"lokr_w1": torch.zeros(1, 1), "lokr_w2": torch.zeros(5, 7 * 3)}
    adapter = Adapter("x", LoKr(r=8, targets=("line",)), {"line": tensors})
    with pytest.raises(UnsupportedField, match="'line' is a Conv1d with a whole lokr_w2"):
        save_adapter(adapter, tmp_path / "x", model=model)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = LoKrConfig(
        r=2, alpha=3, target_modules=["up", "head"], decompose_both=True, decompose_factor=2, rank_dropout_scale=True
    )
    inputs = ZOO["plain_mlp"].inputs()
    peft_files.make_peft(ZOO["plain_mlp"].fresh(), tmp_path / "f", config, inputs=inputs)
    return tmp_path / "f"


def test_what_the_fields_become(folder: Path, tmp_path: Path) -> None:
    adapter = load_adapter(folder)
    targets = adapter.variant.targets
    assert adapter.variant == LoKr(r=2, alpha=3, decompose_both=True, decompose_factor=2, targets=targets)
    save_adapter(adapter, tmp_path / "g")
    assert json.loads((tmp_path / "g" / "adapter_config.json").read_text())["rank_dropout_scale"] is True


@pytest.mark.parametrize(("name", "value"), [("r", 0), ("alpha", None), ("decompose_factor", 0), ("decompose_both", 1)])
def test_wrong_fields(folder: Path, name: str, value: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(UnsupportedField, match=f"sets {name}="):
        load_adapter(folder)


def test_another_factor_is_another_layout(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "decompose_factor": -1}))
    with pytest.raises((ShapeMismatch, UnusedTensors)):
        load_adapter(folder, ZOO["plain_mlp"].model())


def test_tensors_that_do_not_belong_together(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.up.lokr_w2"] = torch.zeros(7, 5)
    save_file(tensors, file)
    with pytest.raises(ShapeMismatch, match="'up' do not belong together"):
        load_adapter(folder)


def test_what_peft_does_not_adapt(tmp_path: Path) -> None:
    path = "transformer.h.0.attn.c_attn"
    tensors = {"lokr_w1": torch.zeros(12, 6), "lokr_w2": torch.zeros(12, 8)}
    adapter = Adapter("x", LoKr(r=8, targets=(path,)), {path: tensors})
    with pytest.raises(SiteUnsupported, match=f"LOKR does not adapt '{path}', which is GPT-2's Conv1D"):
        save_adapter(adapter, tmp_path / "x", model=ZOO["tiny_gpt2"].model())
