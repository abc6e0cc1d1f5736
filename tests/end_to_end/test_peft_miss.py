"""peft_type MISS: MiSS, its mini form, and BAT, in and out, against PEFT's own outputs.

One adapter at a time: of two BATs active together PEFT applies the second to the weight that the first left.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import MissConfig
from safetensors.torch import load_file, save_file

from lorac.errors import ShapeMismatch, SiteUnsupported, UnsupportedField
from lorac.formats import load_adapter, save_adapter
from lorac.variants.base import Adapter
from lorac.variants.bat import BAT
from lorac.variants.miss import MiSS
from tests import peft_files
from tests.end_to_end.peft_cases import Case
from tests.end_to_end.peft_parity import EMITTED, assert_back, assert_eager, assert_onnxruntime
from tests.zoo import ZOO


def _case(name: str, model: str, *targets: str, **settings: Any) -> Case:
    return Case(name, model, MissConfig(**{"r": 3, "target_modules": list(targets), **settings}))


CASES = (
    _case("miss", "plain_mlp", "up", "down", "head", bias="all"),
    _case("mini", "plain_mlp", "up", "down", init_weights="mini", mini_r=2, modules_to_save=["head"]),
    _case("bat", "plain_mlp", "up", "down", r=2, init_weights="bat", bias="MiSS_only"),
    _case("miss", "tiny_llama", "q_proj", "down_proj", r=5, layers_to_transform=[0, 2]),
    _case("mini", "tiny_llama", "k_proj", "up_proj", init_weights="mini", mini_r=4),
    _case("bat", "tiny_llama", "q_proj", "down_proj", r=4, init_weights="bat"),
    _case("miss", "tiny_bert", "query", "dense", exclude_modules=["pooler.dense"]),
    _case("bat", "tiny_bert", "query", "dense", r=8, init_weights="bat", modules_to_save=["classifier"]),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_what_peft_computes(case: Case, tmp_path: Path) -> None:
    assert_eager(case, tmp_path)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_there_and_back(case: Case, tmp_path: Path) -> None:
    assert_back(case, tmp_path)


@pytest.mark.parametrize("mode", EMITTED)
@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.id)
def test_onnxruntime(case: Case, mode: str, tmp_path: Path) -> None:
    assert_onnxruntime(case, tmp_path, mode)


def made(folder: Path, **settings: Any) -> Path:
    config = MissConfig(**{"r": 2, "target_modules": ["up", "down"], **settings})
    peft_files.make_peft(ZOO["plain_mlp"].fresh(), folder, config, inputs=ZOO["plain_mlp"].inputs())
    return folder


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"miss_dropout": 0.25}, MiSS(r=2, dropout=0.25)),
        ({"bias": "MiSS_only"}, MiSS(r=2, bias="miss_only")),
        ({"init_weights": "mini", "mini_r": 2}, MiSS(r=2, mini=True, mini_r=2)),
        ({"init_weights": "bat", "miss_dropout": 0.25, "bias": "MiSS_only"}, BAT(r=2, bias="bat_only")),
    ],
)
def test_what_the_fields_become(tmp_path: Path, settings: dict[str, Any], expected: MiSS | BAT) -> None:
    variant = load_adapter(made(tmp_path / "f", **settings)).variant
    assert sorted(variant.targets) == ["down", "up"]
    assert variant == type(expected)(**{**vars(expected), "targets": variant.targets})


def test_init_weights_false_is_the_same_form(tmp_path: Path) -> None:
    folder = made(tmp_path / "f")
    before = load_adapter(folder)
    configure(folder, init_weights=False)
    assert load_adapter(folder).variant == before.variant


@pytest.mark.parametrize(
    ("name", "value"),
    [("r", 0), ("mini_r", None), ("init_weights", "bone"), ("miss_dropout", "0.1"), ("bias", "some")],
)
def test_wrong_fields(tmp_path: Path, name: str, value: object) -> None:
    folder = made(tmp_path / "f")
    configure(folder, **{name: value})
    with pytest.raises(UnsupportedField, match=f"sets {name}="):
        load_adapter(folder)


def test_a_block_of_another_form(tmp_path: Path) -> None:
    folder = made(tmp_path / "f")
    configure(folder, init_weights="bat")
    with pytest.raises(ShapeMismatch, match=r"'down' do not belong together: miss_block \(2, 6\)"):
        load_adapter(folder)
    configure(folder, init_weights=True, r=3)
    with pytest.raises(ShapeMismatch, match=r"shape \(2, 6\), expected \(3, 6\)"):
        load_adapter(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: t[:, :-1].contiguous() for name, t in tensors.items()}, folder / "adapter_model.safetensors")
    configure(folder, r=2)
    with pytest.raises(ShapeMismatch, match=r"shape \(2, 5\), expected \(2, 6\)"):
        load_adapter(folder, ZOO["plain_mlp"].model())


def test_peft_adapts_nn_linear_only(tmp_path: Path) -> None:
    path = "transformer.h.0.attn.c_attn"
    adapter = Adapter("x", MiSS(r=2, targets=(path,)), {path: {"miss_block": torch.zeros(2, 144)}})
    with pytest.raises(SiteUnsupported, match="MISS does not adapt"):
        save_adapter(adapter, tmp_path / "x", model=ZOO["tiny_gpt2"].model())
