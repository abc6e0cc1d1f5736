"""peft_type IA3, in and out, against PEFT's own outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config

from lorac.errors import ShapeMismatch, SiteUnsupported, UnsupportedField
from lorac.formats import load_adapter, save_adapter
from lorac.variants.base import Adapter
from lorac.variants.ia3 import IA3
from tests import peft_files
from tests.end_to_end.peft_cases import Case
from tests.end_to_end.peft_parity import EMITTED, assert_back, assert_eager, assert_onnxruntime
from tests.zoo import ZOO


def _case(name: str, model: str, *targets: str, inputs: tuple[str, ...] = (), **settings: Any) -> Case:
    config = IA3Config(target_modules=list(targets), feedforward_modules=list(inputs), **settings)
    return Case(name, model, config)


CASES = (
    _case("both", "plain_mlp", "up", "down", "head", inputs=("down", "head")),
    _case("both", "plain_conv", "stem", "grouped", "dilated", "head", inputs=("stem", "grouped", "head")),
    _case("both", "tiny_llama", "k_proj", "v_proj", "down_proj", inputs=("down_proj",)),
    _case("outputs", "tiny_bert", "key", "value", "dense", modules_to_save=["classifier"], task_type="SEQ_CLS"),
    _case("both", "tiny_gpt2", "c_attn", "mlp.c_proj", inputs=("mlp.c_proj",), fan_in_fan_out=True),
    _case("both", "tiny_t5", "k", "v", "wo", inputs=("wo",)),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_what_peft_computes(case: Case, tmp_path: Path) -> None:
    assert_eager(case, tmp_path)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_there_and_back(case: Case, tmp_path: Path) -> None:
    assert_back(case, tmp_path)


@pytest.mark.parametrize("mode", EMITTED)
@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.id)
def test_onnxruntime(case: Case, mode: str, tmp_path: Path) -> None:
    assert_onnxruntime(case, tmp_path, mode)


def made(folder: Path, **settings: Any) -> Path:
    config = IA3Config(**{"target_modules": ["up", "down"], "feedforward_modules": ["down"], **settings})
    peft_files.make_peft(ZOO["plain_mlp"].fresh(), folder, config, inputs=ZOO["plain_mlp"].inputs())
    return folder


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_the_fields_become(tmp_path: Path) -> None:
    variant = load_adapter(made(tmp_path / "f", exclude_modules=["head"])).variant
    assert sorted(variant.targets) == ["down", "up"]
    assert variant == IA3(targets=variant.targets, exclude=("head",), feedforward=("down",))


def test_the_vector_must_be_for_the_configured_side(tmp_path: Path) -> None:
    folder = made(tmp_path / "f")
    for wrong in (["up"], None, ["up", "down"]):
        configure(folder, feedforward_modules=wrong)
        with pytest.raises(ShapeMismatch, match="feedforward_modules"):
            load_adapter(folder)
    configure(folder, feedforward_modules=".*own")
    assert load_adapter(folder).tensors["down"]["ia3_l"].shape == (1, 14)


@pytest.mark.parametrize(("name", "value"), [("feedforward_modules", 3), ("exclude_modules", [1])])
def test_wrong_fields(tmp_path: Path, name: str, value: object) -> None:
    folder = made(tmp_path / "f")
    configure(folder, **{name: value})
    with pytest.raises(UnsupportedField, match=f"sets {name}="):
        load_adapter(folder)


@pytest.mark.parametrize(
    "variant",
    [
        IA3(targets=("model.layers.0.mlp.down_proj", "k_proj"), feedforward=("down_proj",)),
        IA3(targets=("down_proj", "k_proj"), feedforward=("down_proj",), layers=(1,)),
        IA3(targets=("down_proj", "k_proj")),
    ],
)
def test_peft_takes_what_was_made_here(tmp_path: Path, variant: IA3) -> None:
    """PEFT wants feedforward_modules to be among target_modules, letter by letter, and has no layers to choose."""
    model = ZOO["tiny_llama"].fresh(torch.float64)
    paths = [f"model.layers.{i}.{leaf}" for i in range(3) for leaf in ("self_attn.k_proj", "mlp.down_proj")]
    chosen = [p for p in paths if not (variant.layers and ".1." not in p)]
    chosen = [p for p in chosen if "k_proj" in p or "down_proj" in variant.targets or ".0." in p]
    sides = {"k_proj": (48, 1), "down_proj": (1, 96) if variant.feedforward else (64, 1)}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        path: {"ia3_l": 1 + 0.1 * torch.randn(sides[path.rpartition(".")[2]], generator=generator).double()}
        for path in chosen
    }
    save_adapter(Adapter("a", variant, tensors), tmp_path / "a", model=model)
    oracle = peft_files.load_peft(model, tmp_path / "a")
    adapted = {n.removeprefix("base_model.model.").removesuffix(".ia3_l.default") for n in oracle.state_dict()}
    assert adapted & set(paths) == set(chosen)
    again = load_adapter(tmp_path / "a", model)
    assert set(again.tensors) == set(chosen)
    for path in chosen:
        assert torch.equal(again.tensors[path]["ia3_l"], tensors[path]["ia3_l"])


def test_peft_adapts_no_conv1d(tmp_path: Path) -> None:
    model = ZOO["plain_conv"].model()
    adapter = Adapter("x", IA3(targets=("line",)), {"line": {"ia3_l": torch.ones(5, 1)}})
    with pytest.raises(SiteUnsupported, match="IA3 does not adapt 'line', which is conv1d"):
        save_adapter(adapter, tmp_path / "x", model=model)
