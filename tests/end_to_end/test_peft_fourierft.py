"""peft_type FOURIERFT, in and out, against PEFT's own outputs: in float32, for PEFT transforms in nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import FourierFTConfig

import lorac
from lorac.errors import BaseNeeded, ShapeMismatch, SiteUnsupported, UnsupportedField
from lorac.formats import load_adapter, save_adapter
from lorac.variants.base import Adapter
from lorac.variants.fourierft import FourierFT
from tests import parity, peft_files
from tests.end_to_end.peft_cases import Case
from tests.end_to_end.peft_parity import EMITTED, assert_back, assert_eager, assert_onnxruntime
from tests.zoo import ZOO

DTYPE = torch.float32


def _case(name: str, model: str, *targets: str, **settings: Any) -> Case:
    # From zeros: what PEFT draws at first moves the output far more than decides anything.
    fixed = {"n_frequency": 30, "scaling": 20.0, "init_weights": True, "target_modules": list(targets)}
    return Case(name, model, FourierFTConfig(**{**fixed, **settings}))


CASES = (
    _case("bias", "plain_mlp", "up", "head", bias="fourier_only", n_frequency_pattern={"up": 140}),
    _case("saved", "plain_mlp", "up", modules_to_save=["head"], bias="all", random_loc_seed=3),
    _case("linear", "tiny_llama", "q_proj", "down_proj", layers_to_transform=[0, 2]),
    _case("linear", "tiny_bert", "query", "value", "dense", exclude_modules=["pooler.dense"]),
    _case("conv1d", "tiny_gpt2", "c_attn", "c_proj", fan_in_fan_out=True),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_what_peft_computes(case: Case, tmp_path: Path) -> None:
    assert_eager(case, tmp_path, DTYPE)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_there_and_back(case: Case, tmp_path: Path) -> None:
    assert_back(case, tmp_path, DTYPE, alone=False)


@pytest.mark.parametrize("mode", EMITTED)
def test_onnxruntime(mode: str, tmp_path: Path) -> None:
    assert_onnxruntime(CASES[0], tmp_path, mode)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = FourierFTConfig(n_frequency=9, scaling=30, target_modules=["up", "head"], init_weights=True)
    inputs = ZOO["plain_mlp"].inputs()
    peft_files.make_peft(ZOO["plain_mlp"].fresh(), tmp_path / "f", config, inputs=inputs)
    return tmp_path / "f"


def test_needs_the_model(folder: Path) -> None:
    with pytest.raises(BaseNeeded, match="FOURIERFT does not tell the shapes"):
        load_adapter(folder)


def test_what_the_fields_become(folder: Path) -> None:
    variant = load_adapter(folder, ZOO["plain_mlp"].model()).variant
    assert variant == FourierFT(n_frequency=9, scaling=30, targets=variant.targets)


@torch.no_grad()
def test_the_native_file_holds_the_positions(folder: Path, tmp_path: Path) -> None:
    model, inputs = ZOO["plain_mlp"].model(), ZOO["plain_mlp"].inputs()
    save_adapter(load_adapter(folder, model), tmp_path / "a.safetensors", format="native", model=model)
    loaded = load_adapter(tmp_path / "a.safetensors")
    assert loaded.tensors["up"]["indices"].shape == (2, 9)
    oracle = peft_files.load_peft(model, folder)
    parity.assert_parity(lorac.compile(model, {"a": loaded})(**inputs), oracle(**inputs), model(**inputs))


@pytest.mark.parametrize(
    ("name", "value"),
    [("n_frequency", 0), ("scaling", "30"), ("random_loc_seed", None), ("bias", "lora_only")],
)
def test_wrong_fields(folder: Path, name: str, value: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(UnsupportedField, match=f"sets {name}="):
        load_adapter(folder, ZOO["plain_mlp"].model())


def test_another_number_of_frequencies(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "n_frequency": 8}))
    with pytest.raises(ShapeMismatch, match=r"fourierft_spectrum at '.*' has shape \(9,\), expected \(8,\)"):
        load_adapter(folder, ZOO["plain_mlp"].model())


def test_positions_that_peft_cannot_know(folder: Path, tmp_path: Path) -> None:
    model = ZOO["plain_mlp"].model()
    adapter = load_adapter(folder, model)
    adapter.tensors["up"]["indices"] = adapter.tensors["up"]["indices"].flip(-1)
    with pytest.raises(UnsupportedField, match="the positions at 'up' are not those that random_loc_seed chooses"):
        save_adapter(adapter, tmp_path / "x", model=model)


def test_what_peft_does_not_adapt(tmp_path: Path) -> None:
    model, variant = ZOO["plain_mlp"].model(), FourierFT(n_frequency=3, targets=("embed",))
    adapter = lorac.compile(model, {"a": variant}).adapters["a"]
    assert isinstance(adapter, Adapter)
    with pytest.raises(SiteUnsupported, match="FOURIERFT does not adapt 'embed', which is embedding"):
        save_adapter(adapter, tmp_path / "x", model=model)
