"""peft_type BOFT, in and out, against PEFT's own outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import BOFTConfig

from lorac.errors import ShapeMismatch, SiteUnsupported, UnsupportedField
from lorac.formats import load_adapter, save_adapter
from lorac.variants.base import Adapter
from lorac.variants.boft import BOFT
from tests import peft_files
from tests.end_to_end.peft_cases import Case
from tests.end_to_end.peft_parity import EMITTED, assert_back, assert_eager, assert_onnxruntime
from tests.zoo import ZOO


@pytest.fixture(autouse=True)
def without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT compiles a CUDA extension for every layer anew where it cannot, warning of it each time."""
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)


def _case(name: str, model: str, *targets: str, **settings: Any) -> Case:
    return Case(name, model, BOFTConfig(target_modules=list(targets), **settings))


CASES = (
    _case("size", "plain_mlp", "up", "down", "head", boft_block_size=2, bias="all"),
    _case("number", "plain_conv", "stem", "head", boft_block_size=0, boft_block_num=1, bias="boft_only"),
    _case("size", "tiny_llama", "q_proj", "down_proj", boft_block_size=8, layers_to_transform=[0, 2]),
    _case("number", "tiny_bert", "query", "dense", boft_block_size=0, boft_block_num=4, modules_to_save=["classifier"]),
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


def made(folder: Path, **settings: Any) -> Path:
    config = BOFTConfig(**{"boft_block_size": 2, "target_modules": ["up", "down"], **settings})
    peft_files.make_peft(ZOO["plain_mlp"].fresh(), folder, config, inputs=ZOO["plain_mlp"].inputs())
    return folder


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_the_fields_become(tmp_path: Path) -> None:
    variant = load_adapter(made(tmp_path / "f", bias="boft_only", boft_dropout=0.5)).variant
    assert variant == BOFT(block_size=2, targets=variant.targets, bias="boft_only")


@pytest.mark.parametrize(
    ("name", "value"),
    [("boft_block_size", -1), ("boft_block_num", "2"), ("boft_n_butterfly_factor", 0), ("bias", "some")],
)
def test_wrong_fields(tmp_path: Path, name: str, value: object) -> None:
    folder = made(tmp_path / "f")
    configure(folder, **{name: value})
    with pytest.raises(UnsupportedField, match=f"sets {name}="):
        load_adapter(folder)


def test_factors_that_the_file_lacks(tmp_path: Path) -> None:
    """Without its extension PEFT trains one factor, whatever is configured: no rotation of two can be made of it."""
    folder = made(tmp_path / "f", target_modules=["head"])
    configure(folder, boft_n_butterfly_factor=2)
    with pytest.raises((ShapeMismatch, SiteUnsupported)):
        load_adapter(folder)


def test_blocks_of_another_size(tmp_path: Path) -> None:
    folder = made(tmp_path / "f")
    configure(folder, boft_block_size=14)
    with pytest.raises((ShapeMismatch, SiteUnsupported), match=r"'down'|'up'"):
        load_adapter(folder)


def test_peft_adapts_nn_linear_and_conv2d_only(tmp_path: Path) -> None:
    path = "transformer.h.0.attn.c_attn"
    tensors = {"boft_R": torch.zeros(1, 12, 4, 4), "boft_s": torch.ones(144, 1)}
    adapter = Adapter("x", BOFT(targets=(path,)), {path: tensors})
    with pytest.raises(SiteUnsupported, match="BOFT does not adapt"):
        save_adapter(adapter, tmp_path / "x", model=ZOO["tiny_gpt2"].model())
