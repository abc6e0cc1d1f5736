"""peft_type OFT, in and out, against PEFT's own outputs; at convolutions against what PEFT merges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import OFTConfig, get_peft_model

import lorac
from lorac.errors import ShapeMismatch, SiteUnsupported, UnsupportedField
from lorac.formats import load_adapter, save_adapter
from lorac.variants.base import Adapter
from lorac.variants.oft import OFT
from tests import parity, peft_files
from tests.end_to_end.peft_cases import Case
from tests.end_to_end.peft_parity import EMITTED, assert_back, assert_eager, assert_onnxruntime
from tests.zoo import ZOO

pytestmark = pytest.mark.filterwarnings("ignore:Invalid `(r|oft_block_size)`")


def _case(name: str, model: str, *targets: str, **settings: Any) -> Case:
    return Case(name, model, OFTConfig(target_modules=list(targets), **settings))


EXACT = {"use_cayley_neumann": False}
CASES = (
    _case("series", "plain_mlp", "embed", "up", "down", "head", oft_block_size=4, bias="oft_only"),
    _case("exact", "plain_mlp", "up", "down", "head", r=3, oft_block_size=0, **EXACT),
    _case("shared", "plain_mlp", "embed", "down", "head", r=2, oft_block_size=0, block_share=True),
    _case("constrained", "plain_mlp", "up", "down", oft_block_size=5, coft=True, eps=0.6, modules_to_save=["head"]),
    _case("terms", "tiny_llama", "q_proj", "down_proj", num_cayley_neumann_terms=3, layers_to_transform=[0, 2]),
    _case("default", "tiny_llama", "embed_tokens", "q_proj"),
    _case("exact", "tiny_bert", "query", "dense", r=7, oft_block_size=0, modules_to_save=["classifier"], **EXACT),
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


@torch.no_grad()
def test_convolutions_are_what_peft_merges(tmp_path: Path) -> None:
    model, inputs = ZOO["plain_conv"].fresh(torch.float64), ZOO["plain_conv"].inputs(dtype=torch.float64)
    copy: Any = ZOO["plain_conv"].fresh(torch.float64)
    oracle = get_peft_model(copy, OFTConfig(oft_block_size=6, target_modules=["stem", "head"])).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in oracle.named_parameters():
        if "oft_R" in name:
            parameter.copy_(0.08 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    with peft_files.quiet():
        oracle.save_pretrained(str(tmp_path))
    oracle.merge_adapter()
    for mode in ("live", "fused", "baked"):
        compiled = lorac.compile(model, {"a": tmp_path}, mode=mode)
        parity.assert_parity(compiled(**inputs), oracle(**inputs), model(**inputs))


def made(folder: Path, **settings: Any) -> Path:
    config = OFTConfig(**{"oft_block_size": 2, "target_modules": ["up", "down"], **settings})
    peft_files.make_peft(ZOO["plain_mlp"].fresh(), folder, config, inputs=ZOO["plain_mlp"].inputs())
    return folder


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_the_fields_become(tmp_path: Path) -> None:
    settings = {"bias": "oft_only", "module_dropout": 0.5, "block_share": True, "num_cayley_neumann_terms": 4}
    variant = load_adapter(made(tmp_path / "f", **settings)).variant
    wanted = OFT(block_size=2, targets=variant.targets, bias="oft_only", block_share=True, num_cayley_neumann_terms=4)
    assert variant == wanted


@pytest.mark.parametrize("version", [None, "0.17.1", "0.9.0", "none"])
def test_files_of_another_series(tmp_path: Path, version: str | None) -> None:
    folder = made(tmp_path / "f")
    configure(folder, peft_version=version)
    with pytest.raises(UnsupportedField, match=r"before 0\.18"):
        load_adapter(folder)
    for same in ("0.18.0", "0.19.0.dev0@abc", "1.0"):
        configure(folder, peft_version=same)
        load_adapter(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", -1),
        ("oft_block_size", "2"),
        ("block_share", "yes"),
        ("use_cayley_neumann", 1),
        ("num_cayley_neumann_terms", 0),
        ("coft", "yes"),
        ("eps", None),
        ("bias", "some"),
    ],
)
def test_wrong_fields(tmp_path: Path, name: str, value: object) -> None:
    folder = made(tmp_path / "f")
    configure(folder, **{name: value})
    with pytest.raises(UnsupportedField, match=f"sets {name}="):
        load_adapter(folder)


def test_blocks_of_another_size(tmp_path: Path) -> None:
    folder = made(tmp_path / "f")
    configure(folder, oft_block_size=7)
    with pytest.raises(ShapeMismatch, match="oft_R at 'down'"):
        load_adapter(folder, ZOO["plain_mlp"].model())


def test_peft_adapts_no_conv1d(tmp_path: Path) -> None:
    adapter = Adapter("x", OFT(block_size=3, targets=("line",)), {"line": {"oft_R": torch.zeros(7, 3)}})
    with pytest.raises(SiteUnsupported, match="OFT does not adapt 'line'"):
        save_adapter(adapter, tmp_path / "x", model=ZOO["plain_conv"].model())
