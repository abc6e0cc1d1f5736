"""peft_type HRA, in and out, against PEFT's own outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import HRAConfig, get_peft_model

import lorac
from lorac.errors import ShapeMismatch, SiteUnsupported, UnsupportedField
from lorac.formats import load_adapter, save_adapter
from lorac.variants.base import Adapter
from lorac.variants.hra import HRA
from tests import peft_files
from tests.end_to_end.peft_cases import Case
from tests.end_to_end.peft_parity import EMITTED, assert_back, assert_eager, assert_onnxruntime
from tests.zoo import ZOO


def _case(name: str, model: str, *targets: str, **settings: Any) -> Case:
    return Case(name, model, HRAConfig(**{"r": 4, "target_modules": list(targets), **settings}))


CASES = (
    _case("hra", "plain_mlp", "up", "down", "head", r=2, bias="all"),
    _case("hra", "plain_conv", "stem", "head", r=2, bias="hra_only"),
    _case("hra", "tiny_llama", "q_proj", "down_proj", layers_to_transform=[0, 2]),
    _case("hra", "tiny_bert", "query", "dense", r=6, exclude_modules=["pooler.dense"], modules_to_save=["classifier"]),
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


@pytest.mark.parametrize("orthonormal", [False, True])
@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.filterwarnings("ignore:The symmetric initialization can NOT be performed")
@torch.no_grad()
def test_odd_numbers_and_gram_schmidt(tmp_path: Path, r: int, orthonormal: bool) -> None:
    """Neither starts as the identity, and neither can be brought near it: no strength to search for."""
    model, inputs = ZOO["plain_mlp"].fresh(torch.float64), ZOO["plain_mlp"].inputs()
    copy: Any = ZOO["plain_mlp"].fresh(torch.float64)
    oracle = get_peft_model(copy, HRAConfig(r=r, apply_GS=orthonormal, target_modules=["up", "down"]))
    with peft_files.quiet():
        oracle.save_pretrained(str(tmp_path))
    for mode in ("live", "fused", "baked"):
        compiled = lorac.compile(model, {"a": tmp_path}, mode=mode)
        torch.testing.assert_close(compiled(**inputs), oracle.eval()(**inputs), rtol=1e-12, atol=1e-12)


def made(folder: Path, **settings: Any) -> Path:
    config = HRAConfig(**{"r": 2, "target_modules": ["up", "down"], **settings})
    peft_files.make_peft(ZOO["plain_mlp"].fresh(), folder, config, inputs=ZOO["plain_mlp"].inputs())
    return folder


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_the_fields_become(tmp_path: Path) -> None:
    variant = load_adapter(made(tmp_path / "f", bias="hra_only", exclude_modules=["head"])).variant
    assert variant == HRA(r=2, targets=variant.targets, exclude=("head",), bias="hra_only")


@pytest.mark.parametrize(
    ("name", "value"), [("r", 0), ("apply_GS", "yes"), ("bias", "some"), ("layers_to_transform", ["0"])]
)
def test_wrong_fields(tmp_path: Path, name: str, value: object) -> None:
    folder = made(tmp_path / "f")
    configure(folder, **{name: value})
    with pytest.raises(UnsupportedField, match=f"sets {name}="):
        load_adapter(folder)


def test_another_number_of_reflections(tmp_path: Path) -> None:
    folder = made(tmp_path / "f")
    configure(folder, r=3)
    with pytest.raises(ShapeMismatch, match=r"shape \(14, 2\), expected \(14, 3\)"):
        load_adapter(folder)


def test_peft_adapts_nn_linear_and_conv2d_only(tmp_path: Path) -> None:
    path = "transformer.h.0.attn.c_attn"
    adapter = Adapter("x", HRA(r=2, targets=(path,)), {path: {"hra_u": torch.ones(48, 2)}})
    with pytest.raises(SiteUnsupported, match="HRA does not adapt"):
        save_adapter(adapter, tmp_path / "x", model=ZOO["tiny_gpt2"].model())
