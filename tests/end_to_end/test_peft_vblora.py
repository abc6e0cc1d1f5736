"""peft_type VBLORA, in and out, against PEFT's own outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import VBLoRAConfig
from safetensors.torch import load_file, save_file
from torch import nn

import lorac
from lorac.errors import CorruptFile, ShapeMismatch, SiteUnsupported, UnsupportedField
from lorac.formats import load_adapter, save_adapter
from lorac.variants.vblora import VBLoRA
from tests import parity, peft_files
from tests.end_to_end.peft_cases import Case
from tests.end_to_end.peft_parity import EMITTED, assert_back, assert_eager, assert_onnxruntime
from tests.zoo import ZOO

WEIGHTS = "adapter_model.safetensors"


def _case(name: str, model: str, *targets: str, **settings: Any) -> Case:
    sizes = {"r": 3, "num_vectors": 7, "vector_length": 2}
    return Case(name, model, VBLoRAConfig(**{**sizes, "target_modules": list(targets), **settings}))


CASES = (
    _case("plain", "plain_mlp", "up", "down", bias="vblora_only"),
    _case("top3", "plain_mlp", "up", "down", topk=3, modules_to_save=["head"]),
    _case("layers", "tiny_llama", "q_proj", "down_proj", layers_to_transform=[0, 2], vector_length=16, r=2),
    _case("bias", "tiny_bert", "query", "value", bias="all", modules_to_save=["classifier"]),
    _case("conv1d", "tiny_gpt2", "c_attn", "c_proj", fan_in_fan_out=True, exclude_modules=["h.0.mlp.c_proj"]),
)
CHOSEN = (
    _case("chosen", "plain_mlp", "up", "down", save_only_topk_weights=True),
    _case("chosen", "tiny_bert", "query", "value", save_only_topk_weights=True, topk=3, num_vectors=300),
    _case("one", "plain_mlp", "up", "down", save_only_topk_weights=True, topk=1),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_what_peft_computes(case: Case, tmp_path: Path) -> None:
    assert_eager(case, tmp_path)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_there_and_back(case: Case, tmp_path: Path) -> None:
    assert_back(case, tmp_path)


@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.id)
def test_files_of_the_chosen_weights_alone(case: Case, tmp_path: Path) -> None:
    """In float32, the one dtype in which PEFT reads such a file."""
    assert_eager(case, tmp_path, torch.float32)


@pytest.mark.parametrize("mode", EMITTED)
def test_onnxruntime(mode: str, tmp_path: Path) -> None:
    assert_onnxruntime(CASES[0], tmp_path, mode)


def made(folder: Path, **settings: Any) -> tuple[nn.Module, Path]:
    model = ZOO["plain_mlp"].fresh()
    sizes = {"r": 2, "num_vectors": 6, "vector_length": 2, "target_modules": ["up", "down"]}
    config = VBLoRAConfig(**{**sizes, **settings})
    peft_files.make_peft(model, folder, config, inputs=ZOO["plain_mlp"].inputs())
    return model, folder


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@torch.no_grad()
def test_the_chosen_alone_are_written_back_as_logits(tmp_path: Path) -> None:
    model, folder = made(tmp_path / "f", save_only_topk_weights=True, topk=3)
    tokens, oracle = ZOO["plain_mlp"].inputs(), peft_files.load_peft(model, folder)
    adapter = load_adapter(folder)
    assert all(torch.isfinite(tensor).all() for tensor in adapter.parameters())
    save_adapter(adapter, tmp_path / "back", model=model)
    assert "base_model.model.up.vblora_logits_A" in load_file(tmp_path / "back" / WEIGHTS)
    again = peft_files.load_peft(model, tmp_path / "back")
    parity.assert_parity(again(**tokens), oracle(**tokens), model(**tokens))


@torch.no_grad()
def test_whole_and_chosen_files_mean_the_same(tmp_path: Path) -> None:
    model, folder = made(tmp_path / "f")
    whole = load_adapter(folder, model)
    tensors = load_file(folder / WEIGHTS)
    for name in [name for name in tensors if "logits" in name]:
        logits, places = tensors.pop(name).topk(2)
        tensors[f"{name}_topk_indices"] = places.to(torch.uint8)
        tensors[f"{name}_topk_weights"] = torch.softmax(logits, dim=-1)[..., :-1].contiguous()
    save_file(tensors, folder / WEIGHTS)
    configure(folder, save_only_topk_weights=True)
    chosen = load_adapter(folder, model)
    tokens = ZOO["plain_mlp"].inputs()
    expected, found = (lorac.compile(model, {"a": one})(**tokens) for one in (whole, chosen))
    parity.assert_parity(found, expected, model(**tokens))


@pytest.mark.parametrize("changes", [{"topk": 3}, {"num_vectors": 3}])
def test_choices_of_another_configuration(tmp_path: Path, changes: dict[str, int]) -> None:
    model, folder = made(tmp_path / "f", save_only_topk_weights=True)
    configure(folder, **changes)
    with pytest.raises(ShapeMismatch, match="do not choose"):
        load_adapter(folder, model)


def test_a_file_without_its_bank(tmp_path: Path) -> None:
    model, folder = made(tmp_path / "f")
    tensors = load_file(folder / WEIGHTS)
    save_file({name: t for name, t in tensors.items() if "bank" not in name}, folder / WEIGHTS)
    with pytest.raises(CorruptFile, match="lacks 'vblora_vector_bank'"):
        load_adapter(folder, model)


def test_a_site_that_lacks_half_of_it(tmp_path: Path) -> None:
    model, folder = made(tmp_path / "f")
    tensors = load_file(folder / WEIGHTS)
    save_file({name: t for name, t in tensors.items() if "up.vblora_logits_B" not in name}, folder / WEIGHTS)
    with pytest.raises(ShapeMismatch, match="'up' do not belong together"):
        load_adapter(folder, model)


def test_what_the_fields_become(tmp_path: Path) -> None:
    settings = {"topk": 3, "vblora_dropout": 0.25, "init_vector_bank_bound": 0.03, "bias": "vblora_only"}
    variant = load_adapter(made(tmp_path / "f", **settings)[1]).variant
    assert sorted(variant.targets) == ["down", "up"]
    assert variant == VBLoRA(
        r=2,
        num_vectors=6,
        vector_length=2,
        topk=3,
        dropout=0.25,
        init_vector_bank_bound=0.03,
        bias="vblora_only",
        targets=variant.targets,
    )


@pytest.mark.parametrize(
    ("name", "value"), [("r", 0), ("topk", "2"), ("vector_length", None), ("save_only_topk_weights", 1)]
)
def test_wrong_fields(tmp_path: Path, name: str, value: object) -> None:
    folder = made(tmp_path / "f")[1]
    configure(folder, **{name: value})
    with pytest.raises(UnsupportedField, match=f"sets {name}="):
        load_adapter(folder)


def test_peft_adapts_linear_layers_only(tmp_path: Path) -> None:
    model = ZOO["plain_conv"].model()
    variant = VBLoRA(r=2, num_vectors=5, vector_length=2, targets=("stem",))
    adapter = lorac.compile(model, {"a": variant}).adapters["a"]
    with pytest.raises(SiteUnsupported, match="VBLORA does not adapt 'stem', which is conv2d"):
        save_adapter(adapter, tmp_path / "x", model=model)
