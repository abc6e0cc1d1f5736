"""Tensors of dtypes and shapes that a method does not expect: refused by name, or read in a dtype torch computes in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lorac
from campaigns import sound
from lorac.formats._config_fields import EXPERTS, SEAL
from tests.limits import within_budget

CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "no axes": lambda tensor: torch.zeros((), dtype=tensor.dtype),
    "empty": lambda tensor: tensor[:0],
    "int32": lambda tensor: tensor.int(),
    "uint64": lambda tensor: tensor.abs().to(torch.uint64),
    "float8": lambda tensor: tensor.float().to(torch.float8_e4m3fn),
    "complex": lambda tensor: tensor.to(torch.complex64),
}


def change(path: Path, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change all tensors of a file, and take lorac's seals off it."""
    with safe_open(path, "pt") as file:
        metadata = {key: text for key, text in (file.metadata() or {}).items() if key not in {SEAL, EXPERTS}}
    save_file({name: how(tensor).contiguous().clone() for name, tensor in load_file(path).items()}, path, metadata)


@pytest.mark.medium("methods of factors, of indices, and of shared vectors", keep=["lora-*", "shira-*", "vblora-*"])
@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("method", ["fourierft", "oft", "shira", "trainable_tokens", "vblora", "lora"])
def test_reads_or_rejects_every_method(method: str, how: str, tmp_path: Path) -> None:
    for one in sound.write_methods(tmp_path, [method]):
        place = tmp_path / one.place
        if one.kind == "bin":
            continue
        change(place if place.is_file() else place / "adapter_model.safetensors", CHANGES[how])
        for model in (None, sound.model(one.host)):
            try:
                adapter = lorac.load_adapter(place, model)
                lorac.compile(sound.model(one.host), {"a": adapter})
            except lorac.LoracError:
                continue


@pytest.mark.medium("the other layout", cases=["peft"])
@pytest.mark.parametrize("format", ["xlora", "peft"])
def test_experts_of_eight_bits_are_mixed(format: str, tmp_path: Path) -> None:
    """As PEFT does, which casts what it loads to float32."""
    places: Any = {one.kind: tmp_path / one.place for one in sound._xlora(tmp_path)}
    for path in places[format].rglob("*.safetensors"):
        change(path, lambda tensor: tensor)
    expert = places[format] / "0" / "adapter_model.safetensors"
    values = {key: tensor.float() for key, tensor in load_file(expert).items()}
    change(expert, CHANGES["float8"])
    adapter = lorac.load_adapter(places[format], sound.model("tiny_llama"))
    stacked = adapter.tensors["model.layers.0.self_attn.q_proj"]["lora_A"]
    expected = values["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert stacked.dtype is torch.float32
    assert torch.equal(stacked[: len(expected)], expected.to(torch.float8_e4m3fn).float())


@pytest.mark.medium("methods whose layout computes with the values", keep=["ia3"])
@pytest.mark.parametrize("method", ["boft", "ia3", "loha"])
def test_image_files_of_eight_bits_have_the_values_of_wider_ones(method: str, tmp_path: Path) -> None:
    stored = next(one for one in sound._kohya(tmp_path) if one.what == method and one.host == "conv")
    host, rounded = sound.model("conv"), tmp_path / "rounded.safetensors"
    shutil.copyfile(tmp_path / stored.place, rounded)
    change(tmp_path / stored.place, CHANGES["float8"])
    change(rounded, lambda tensor: CHANGES["float8"](tensor).float())
    read, expected = (lorac.load_adapter(path, host).tensors for path in (tmp_path / stored.place, rounded))
    assert {path: [*held] for path, held in read.items()} == {path: [*held] for path, held in expected.items()}
    assert all(torch.equal(read[path][name], expected[path][name]) for path in read for name in read[path])


@pytest.mark.medium("one field", keep=["1e+308-reduction*"])
@pytest.mark.parametrize("field", ["reduction_factor", "inv_adapter_reduction_factor"])
@pytest.mark.parametrize("factor", [1e-308, 1e-9, 1e308])
def test_a_reduction_is_compared_with_the_tensors(field: str, factor: float, tmp_path: Path) -> None:
    """Before anything of the width is made that follows from it."""
    bottleneck = next(sound._adapterhub(tmp_path))
    path = tmp_path / bottleneck.place / "adapter_config.json"
    described = json.loads(path.read_text())
    described["config"] |= {field: factor, **({"inv_adapter": "nice"} if field.startswith("inv") else {})}
    path.write_text(json.dumps(described))
    change(path.with_name("adapter.safetensors"), lambda tensor: tensor)
    with within_budget(), pytest.raises(lorac.LoracError):
        lorac.load_adapter(path.parent, sound.model("tiny_bert"))
