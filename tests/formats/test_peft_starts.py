"""Adapters whose initialisation PEFT subtracted from the base, over the base as it was before."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn

import lorac
from lorac import load_adapter, save_adapter
from lorac.training.initialisation import PiSSA
from tests import parity, peft_files
from tests.formats.oracle import assert_same, call
from tests.refusing import refuses
from tests.zoo import ZOO

UP_DOWN = {"target_modules": ["up", "down"], "r": 2, "lora_alpha": 3}
INITS = ("pissa", "olora", "OLoRA")


def made(folder: Path, init: str, name: str = "plain_mlp", **settings: Any) -> tuple[nn.Module, Any, Any]:
    """Return a model, PEFT's model of a file that it wrote, and inputs."""
    entry = ZOO[name]
    config = LoraConfig(**{**UP_DOWN, "init_lora_weights": init, **settings})
    oracle = peft_files.make_peft(entry.model(), folder, config, inputs=entry.inputs(), outputs=entry.outputs)
    return entry.model(), oracle, entry.inputs()


@torch.no_grad()
def move(wrapped: nn.Module) -> None:
    for name, parameter in wrapped.named_parameters():
        parameter.mul_(1.3 if "lora_A" in name else 1)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("plain_mlp", {}),
        ("plain_mlp", {"rank_pattern": {"down": 3}, "alpha_pattern": {"up": 7}}),
        ("plain_mlp", {"use_rslora": True, "use_dora": True}),
    ],
)
def test_matches_peft(tmp_path: Path, init: str, name: str, settings: dict[str, Any]) -> None:
    decides(tmp_path, init, name, settings)


def test_of_a_weight_that_is_stored_transposed(tmp_path: Path) -> None:
    """OLoRA takes the QR decomposition of what is stored there, and PEFT fails of it."""
    decides(tmp_path, "pissa", "tiny_gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True})


def decides(tmp_path: Path, init: str, name: str, settings: dict[str, Any]) -> None:
    model, oracle, inputs = made(tmp_path / "f", init, name, **settings)
    adapter = load_adapter(tmp_path / "f", model)
    assert isinstance(adapter.variant, lorac.Residual)
    assert_same(model, adapter, oracle, inputs)
    compiled = lorac.compile(model, {"a": tmp_path / "f"})
    names = None if len(inputs) == 1 else ["logits"]
    parity.assert_parity(call(compiled, inputs), call(oracle, inputs), call(model, inputs), names=names)


def test_peft_reads_a_saved_pissa_as_a_plain_lora(tmp_path: Path) -> None:
    """It is a plain LoRA of twice the rank, as PEFT's conversion makes it."""
    model, oracle, inputs = made(tmp_path / "f", "pissa")
    adapter = load_adapter(tmp_path / "f", model)
    save_adapter(adapter, tmp_path / "g", model=model)
    raw = json.loads((tmp_path / "g" / "adapter_config.json").read_text())
    assert (raw["r"], raw["init_lora_weights"]) == (4, True)
    again = peft_files.load_peft(model, tmp_path / "g")
    parity.assert_parity(call(again, inputs), call(oracle, inputs), call(model, inputs))
    save_adapter(adapter, tmp_path / "h.safetensors", format="native", model=model)
    native = load_adapter(tmp_path / "h.safetensors", model)
    assert native.variant == adapter.variant
    parity.assert_parity(call(lorac.compile(model, {"a": native}), inputs), call(oracle, inputs), call(model, inputs))


def test_peft_reads_an_adapter_initialised_by_lorac(tmp_path: Path) -> None:
    model, inputs = ZOO["plain_mlp"].model(), ZOO["plain_mlp"].inputs()
    adapter = PiSSA()(lorac.LoRA(r=2, alpha=3, targets=("up", "down")), model)
    for tensors in adapter.tensors.values():
        tensors["lora_A"] = tensors["lora_A"] * 1.3
    save_adapter(adapter, tmp_path / "f", model=model)
    compiled = lorac.compile(model, {"a": adapter})
    oracle = peft_files.load_peft(model, tmp_path / "f")
    parity.assert_parity(call(compiled, inputs), call(oracle, inputs), call(model, inputs))


def test_peft_has_no_residual_of_dora(tmp_path: Path) -> None:
    model = ZOO["plain_mlp"].model()
    adapter = PiSSA()(lorac.DoRA(r=2, targets=("up",)), model)
    with pytest.raises(lorac.LoracError, match="dora over a residual"):
        save_adapter(adapter, tmp_path / "f", model=model)
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
def test_converted_files_are_plain(tmp_path: Path, init: str) -> None:
    """With path_initial_model_for_weight_conversion PEFT writes a LoRA of twice the rank over the original base."""
    model, inputs = ZOO["plain_mlp"].model(), ZOO["plain_mlp"].inputs()
    wrapped = peft_files.wrap(model, LoraConfig(**UP_DOWN, init_lora_weights=init))
    # PEFT wants the start as one that changes no base, as which it is to be read.
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(str(tmp_path / "start"))
    wrapped.peft_config["default"].init_lora_weights = init
    move(wrapped)
    with peft_files.quiet():
        wrapped.save_pretrained(str(tmp_path / "f"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    adapter = load_adapter(tmp_path / "f", model)
    assert type(adapter.variant) is lorac.LoRA and adapter.variant.r == 4
    found = call(lorac.compile(model, {"a": adapter}), inputs)
    parity.assert_parity(found, call(wrapped, inputs), call(model, inputs))


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
def test_in_memory_the_base_is_rewritten_already(init: str) -> None:
    """The base of a wrapped model is the one that PEFT rewrote, so that nothing is subtracted again."""
    model, inputs = ZOO["plain_mlp"].model(), ZOO["plain_mlp"].inputs()
    wrapped = peft_files.wrap(model, LoraConfig(**UP_DOWN, init_lora_weights=init))
    move(wrapped)
    parity.assert_parity(call(lorac.compile(wrapped), inputs), call(wrapped, inputs), call(model, inputs))


@pytest.mark.parametrize("init", INITS)
def test_needs_the_base(tmp_path: Path, init: str) -> None:
    folder = peft_files.save_small(tmp_path / "f", "LORA")
    peft_files.configure(folder, init_lora_weights=init)
    with pytest.raises(lorac.BaseNeeded, match=f"was initialised by {init.lower()}"):
        load_adapter(folder)
    with pytest.raises(lorac.BaseNeeded):
        load_adapter(folder, copy.deepcopy(ZOO["plain_mlp"].model()).to("meta"))
    assert load_file(folder / peft_files.WEIGHTS)


def test_rejects_initialisations_that_peft_lacks(tmp_path: Path) -> None:
    folder = peft_files.save_small(tmp_path / "f", "LORA", target_modules=["embed"])
    peft_files.configure(folder, init_lora_weights="pissa")
    with refuses("unsupported_field", match="at linear layers only"):
        load_adapter(folder, ZOO["plain_mlp"].model())
