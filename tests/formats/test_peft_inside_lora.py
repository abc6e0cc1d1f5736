"""PEFT's LORA with use_bdlora and with kasa_config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import lorac
from lorac import BDLoRA, KaSA, load_adapter, save_adapter
from tests.parity import assert_parity
from tests.peft_files import CONFIG, IS_OLDER, WEIGHTS, configure, load_peft, make_peft
from tests.refusing import refuses
from tests.zoo import ZOO

if IS_OLDER:
    pytest.skip("PEFT has KaSA from 0.21 on", allow_module_level=True)
from peft.tuners.lora.config import BdLoraConfig, KasaConfig

BLOCKS = BdLoraConfig(target_modules_bd_a=["down"], target_modules_bd_b=["up"], nblocks=2)
CASES = {
    "blocks": LoraConfig(r=4, lora_alpha=6, target_modules=["up", "down"], use_bdlora=BLOCKS),
    "kasa": LoraConfig(r=2, lora_alpha=3, target_modules=["up", "down"], kasa_config=KasaConfig(beta=0.5)),
}
METHODS = {"blocks": BDLoRA, "kasa": KaSA}


@pytest.fixture(scope="module")
def base() -> Any:
    return ZOO["plain_mlp"].fresh(torch.float32)  # PEFT decomposes in it, whatever the dtype of the model


@pytest.fixture(scope="module", params=CASES)
def made(request: pytest.FixtureRequest, base: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """The name of a case, its folder, and PEFT's model of it."""
    folder, entry = tmp_path_factory.mktemp(request.param), ZOO["plain_mlp"]
    oracle = make_peft(base, folder, CASES[request.param], inputs=entry.inputs(), outputs=entry.outputs)
    return request.param, folder, oracle


@torch.no_grad()
@pytest.mark.parametrize("mode", ["live", "fused", "baked"])
def test_equals_peft_in_every_mode(mode: str, made: tuple[str, Path, Any], base: Any) -> None:
    _, folder, oracle = made
    inputs = ZOO["plain_mlp"].inputs()
    plain = base(**inputs)
    compiled = lorac.compile(base, {"a": folder}, mode=mode)
    assert_parity(compiled(**inputs), oracle(**inputs), plain)


@torch.no_grad()
def test_goes_back_tensor_for_tensor(made: tuple[str, Path, Any], base: Any, tmp_path: Path) -> None:
    name, folder, oracle = made
    adapter = load_adapter(folder, base)
    assert type(adapter.variant) is METHODS[name]
    save_adapter(adapter, tmp_path / "back", model=base)
    before, after = load_file(folder / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    field = {"blocks": "use_bdlora", "kasa": "kasa_config"}[name]
    fields = [json.loads((place / CONFIG).read_text())[field] for place in (folder, tmp_path / "back")]
    assert fields[0] == fields[1]
    inputs = ZOO["plain_mlp"].inputs()
    assert_parity(load_peft(base, tmp_path / "back")(**inputs), oracle(**inputs), base(**inputs))


@torch.no_grad()
@pytest.mark.parametrize("variant", [BDLoRA(r=4, nblocks=2, target_modules_bd_b=("up",), targets=("up",)), KaSA(r=2)])
def test_peft_loads_a_fresh_adapter(variant: Any, base: Any, tmp_path: Path) -> None:
    compiled, inputs = lorac.compile(base, {"a": variant}), ZOO["plain_mlp"].inputs()
    generator = torch.Generator().manual_seed(1)
    for tensors in compiled.adapters["a"].tensors.values():
        tensors["lora_B"].normal_(0, 0.06, generator=generator)
    save_adapter(compiled.adapters["a"], tmp_path / "f", model=base)
    assert_parity(compiled(**inputs), load_peft(base, tmp_path / "f")(**inputs), base(**inputs))


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_a_peft_model_is_taken_as_it_is(name: str) -> None:
    """KaSA has truncated its base already: what is truncated again is zero."""
    model, inputs = ZOO["plain_mlp"].fresh(torch.float32), ZOO["plain_mlp"].inputs()
    wrapped = get_peft_model(model, CASES[name]).eval()
    for path, parameter in wrapped.named_parameters():
        if "lora_B" in path:
            parameter.normal_(0, 0.07, generator=torch.Generator().manual_seed(1))
    with wrapped.disable_adapter():
        plain = wrapped(**inputs)
    assert_parity(lorac.compile(wrapped)(**inputs), wrapped(**inputs), plain)


@pytest.mark.parametrize("name", CASES)
def test_a_configuration_makes_a_fresh_adapter(name: str, base: Any) -> None:
    compiled = lorac.compile(base, {"a": CASES[name]})
    assert type(compiled.adapters["a"].variant) is METHODS[name]


def test_kasa_needs_the_base(made: tuple[str, Path, Any]) -> None:
    name, folder, _ = made
    if name == "kasa":
        with pytest.raises(lorac.BaseNeeded, match="pass model="):
            load_adapter(folder)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"use_bdlora": {"nblocks": 2, "blocks": 3}}, "sets use_bdlora=.*expected the fields"),
        ({"use_bdlora": {"nblocks": 0}}, "sets use_bdlora="),
        ({"use_bdlora": {"nblocks": 2}, "use_dora": True}, "sets use_bdlora=.*together with use_dora=True"),
        ({"kasa_config": {"beta": "0.1"}}, "sets kasa_config="),
        ({"kasa_config": {"beta": 0.1}, "use_dora": True}, "sets kasa_config=.*together with use_dora=True"),
        ({"kasa_config": {"beta": 0.1}, "use_bdlora": {"nblocks": 2}}, "sets kasa_config=.*together with use_bdlora"),
    ],
)
def test_rejects_fields(changes: dict[str, Any], match: str, base: Any, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["up", "down"])
    make_peft(base, tmp_path / "f", config, inputs=ZOO["plain_mlp"].inputs(), outputs=ZOO["plain_mlp"].outputs)
    configure(tmp_path / "f", **changes)
    with refuses("unsupported_field", match=match):
        load_adapter(tmp_path / "f", base)


@pytest.mark.parametrize(("name", "field"), [("blocks", "use_bdlora"), ("kasa", "kasa_config")])
def test_rejects_tensors_without_their_field(name: str, field: str, base: Any, tmp_path: Path) -> None:
    make_peft(base, tmp_path / "f", CASES[name], inputs=ZOO["plain_mlp"].inputs(), outputs=ZOO["plain_mlp"].outputs)
    configure(tmp_path / "f", **{field: None})
    with pytest.raises(lorac.LoracError, match=r"do not belong together|'lora_diag' at '.*' that its method"):
        load_adapter(tmp_path / "f", base)


def test_rejects_saving_gpt2_s_layers(tmp_path: Path) -> None:
    host = ZOO["tiny_gpt2"].model()
    adapter = lorac.compile(host, {"a": KaSA(r=2, targets=("transformer.h.0.attn.c_attn",))}).adapters["a"]
    with refuses("site_unsupported", match="kasa does not adapt .*GPT-2's Conv1D"):
        save_adapter(adapter, tmp_path / "x", model=host)


@pytest.mark.parametrize(
    ("variant", "match"),
    [
        (BDLoRA(targets=("up",), match_strict=True), "cut A into 0 and B into 0"),
        (BDLoRA(targets=("up",), target_modules_bd_a=("u",), target_modules_bd_b=("up",)), "cut A into 1 and B into 1"),
        (BDLoRA(r=4, targets=("up",), target_modules_bd_a=("up",), nblocks=3), "into 3 blocks"),
        (KaSA(r=10, targets=("up",)), "takes r up to 9, not 10"),
    ],
)
def test_rejects_layers(variant: Any, match: str, base: Any) -> None:
    with refuses("site_unsupported", match=match):
        lorac.compile(base, {"a": variant})
