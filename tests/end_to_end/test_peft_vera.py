"""peft_type VERA, in and out, against PEFT's own outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import VeraConfig
from safetensors.torch import load_file, save_file
from torch import nn

import lorac
from lorac.errors import BaseNeeded, CorruptFile, ShapeMismatch, SiteNotFound, SiteUnsupported, UnsupportedField
from lorac.formats import load_adapter, save_adapter
from lorac.variants.base import Adapter
from lorac.variants.vera import VeRA
from tests import peft_files
from tests.end_to_end.peft_cases import Case
from tests.end_to_end.peft_parity import EMITTED, assert_back, assert_eager, assert_onnxruntime
from tests.zoo import ZOO

WEIGHTS = "adapter_model.safetensors"
pytestmark = pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A and vera_B")


def _case(name: str, model: str, *targets: str, **settings: Any) -> Case:
    return Case(name, model, VeraConfig(**{"r": 3, "target_modules": list(targets), **settings}))


CASES = (
    _case("plain", "plain_mlp", "up", "down", "head", bias="vera_only"),
    _case("saved", "plain_mlp", "up", "down", modules_to_save=["head"], projection_prng_key=4),
    _case("layers", "tiny_llama", "q_proj", "down_proj", layers_to_transform=[0, 2]),
    _case("dense", "tiny_llama", "q_proj", "k_proj", r=64),
    _case("bias", "tiny_bert", "query", "value", "dense", bias="all", modules_to_save=["classifier"]),
    _case("conv1d", "tiny_gpt2", "c_attn", "c_proj", fan_in_fan_out=True),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_what_peft_computes(case: Case, tmp_path: Path) -> None:
    assert_eager(case, tmp_path)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_there_and_back(case: Case, tmp_path: Path) -> None:
    assert_back(case, tmp_path)


@pytest.mark.parametrize(("model", "target"), [("plain_mlp", "up"), ("tiny_bert", "dense")])
def test_a_file_that_leaves_out_what_its_seed_tells(model: str, target: str, tmp_path: Path) -> None:
    case = _case("seed", model, target, save_projection=False, projection_prng_key=7)
    assert_eager(case, tmp_path / "f")
    assert_back(case, tmp_path, alone=False)


@pytest.mark.parametrize("mode", EMITTED)
def test_onnxruntime(mode: str, tmp_path: Path) -> None:
    assert_onnxruntime(CASES[0], tmp_path, mode)


def made(folder: Path, **settings: Any) -> tuple[nn.Module, Path]:
    model = ZOO["plain_mlp"].fresh()
    config = VeraConfig(**{"r": 2, "target_modules": ["up", "down"], **settings})
    peft_files.make_peft(model, folder, config, inputs=ZOO["plain_mlp"].inputs())
    return model, folder


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in changes.items():
        key = f"base_model.{name}"
        tensors = {k: t for k, t in tensors.items() if k != key} | ({} if tensor is None else {key: tensor})
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("key", [0, 11])
def test_the_seed_tells_what_peft_draws(key: int, tmp_path: Path) -> None:
    """Bit for bit: a file without A and B is read as the same file with them."""
    with_both = load_adapter(made(tmp_path / "f", projection_prng_key=key)[1])
    model, folder = made(tmp_path / "g", projection_prng_key=key, save_projection=False)
    assert not [name for name in load_file(folder / WEIGHTS) if "lambda" not in name]
    drawn = load_adapter(folder, model)
    for path, tensors in with_both.tensors.items():
        for name in ("vera_A", "vera_B"):
            assert torch.equal(drawn.tensors[path][name], tensors[name])
    with pytest.raises(BaseNeeded, match="save_projection=False"):
        load_adapter(folder)
    with pytest.raises(SiteNotFound):
        load_adapter(folder, ZOO["tiny_llama"].model())


def test_one_tensor_object_and_one_in_the_file(tmp_path: Path) -> None:
    model, folder = made(tmp_path / "f")
    adapter = load_adapter(folder, model)
    assert len({id(tensors["vera_A"]) for tensors in adapter.tensors.values()}) == 1
    save_adapter(adapter, tmp_path / "back", model=model)
    assert set(load_file(tmp_path / "back" / WEIGHTS)) == set(load_file(folder / WEIGHTS))


def test_a_fresh_one_is_loaded_by_peft(tmp_path: Path) -> None:
    """Trained in lorac from its own start; every layer of another size."""
    model = ZOO["plain_mlp"].fresh(torch.float64)
    compiled = lorac.compile(model, {"a": VeRA(r=2, targets=("up", "down"))})
    with torch.no_grad():
        for tensors in compiled.adapters["a"].tensors.values():
            tensors["vera_lambda_b"].normal_()
        save_adapter(compiled.adapters["a"], tmp_path / "f", model=model)
        tokens = ZOO["plain_mlp"].inputs()
        torch.testing.assert_close(peft_files.load_peft(model, tmp_path / "f")(**tokens), compiled(**tokens))


def test_copies_of_the_shared_tensors(tmp_path: Path) -> None:
    model, folder = made(tmp_path / "f")
    before = load_adapter(folder, model)
    shared = load_file(folder / WEIGHTS)["base_model.vera_A"]
    change(folder, **{"model.up.vera_A": shared.clone()})
    assert load_adapter(folder, model).tensors.keys() == before.tensors.keys()
    change(folder, **{"model.up.vera_A": shared + 1})
    with pytest.raises(CorruptFile, match="copies of one tensor, and differ"):
        load_adapter(folder, model)


def test_a_file_that_lacks_what_it_promises(tmp_path: Path) -> None:
    model, folder = made(tmp_path / "f")
    change(folder, vera_B=None)
    with pytest.raises(CorruptFile, match="lacks 'vera_B', which all its sites have in common"):
        load_adapter(folder, model)


def test_shared_tensors_that_are_too_small(tmp_path: Path) -> None:
    model, folder = made(tmp_path / "f")
    change(folder, vera_A=torch.zeros(2, 5))
    with pytest.raises(ShapeMismatch, match=r"vera_A at 'down' has shape \(2, 5\), expected \(2, 14\)"):
        load_adapter(folder, model)


def test_what_the_fields_become(tmp_path: Path) -> None:
    settings = {"projection_prng_key": 3, "vera_dropout": 0.25, "d_initial": 0.5, "bias": "vera_only"}
    variant = load_adapter(made(tmp_path / "f", **settings)[1]).variant
    assert sorted(variant.targets) == ["down", "up"]
    expected = VeRA(r=2, projection_prng_key=3, dropout=0.25, d_initial=0.5, bias="vera_only", targets=variant.targets)
    assert variant == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [("r", 0), ("projection_prng_key", "0"), ("save_projection", "yes"), ("bias", "lora_only"), ("d_initial", None)],
)
def test_wrong_fields(tmp_path: Path, name: str, value: object) -> None:
    folder = made(tmp_path / "f")[1]
    configure(folder, **{name: value})
    with pytest.raises(UnsupportedField, match=f"sets {name}="):
        load_adapter(folder)


def test_peft_adapts_linear_layers_only(tmp_path: Path) -> None:
    model = ZOO["plain_mlp"].model()
    adapter = lorac.compile(model, {"a": VeRA(r=2, targets=("embed",))}).adapters["a"]
    assert isinstance(adapter, Adapter)
    with pytest.raises(SiteUnsupported, match="VERA does not adapt 'embed', which is embedding"):
        save_adapter(adapter, tmp_path / "x", model=model)
