"""LoRA files of diffusers' pipelines, against PEFT in place."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorac
from lorac import load_adapter, save_adapter
from tests import image_files
from tests.formats.oracle import assert_equal
from tests.parity import assert_parity

pytest.importorskip("diffusers")
ALPHAS = {"unet": 8.0, "text_encoder": 1.0}


@pytest.fixture(scope="module")
def pair() -> dict[str, Any]:
    return image_files.make_pair()


@pytest.fixture(scope="module")
def adapted(pair: dict[str, Any]) -> dict[str, Any]:
    return image_files.adapt_with_peft(pair)


@pytest.fixture(scope="module")
def tensors(adapted: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {key: tensor.contiguous() for key, tensor in image_files.peft_tensors(adapted).items()}


def _describe(adapted: dict[str, Any]) -> dict[str, str]:
    """Return the metadata that diffusers writes."""
    fields = {
        f"{component}.{name}": sorted(value) if isinstance(value, set) else value
        for component, model in adapted.items()
        for name, value in model.peft_config["default"].to_dict().items()
    }
    return {"format": "pt", "lora_adapter_metadata": json.dumps(fields)}


def _check_outputs(pair: dict[str, Any], adapted: dict[str, Any], adapter: Any) -> None:
    """In float64, where what the deciding measure allows is the error of no rounding."""
    pair, adapted = ({name: copy.deepcopy(one).double() for name, one in models.items()} for models in (pair, adapted))
    compiled = lorac.compile(pair, {"style": adapter})
    found = image_files.run_pair({name: compiled[name] for name in pair})
    assert_parity(found, image_files.run_pair(adapted), image_files.run_pair(pair))


def _spell(spelling: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if spelling == "mixture":
        return image_files.to_mixture(tensors)
    if spelling == "kohya":
        return image_files.to_kohya(tensors, ALPHAS)
    if spelling == "oldest":
        return {_name_as_oldest(key): tensor for key, tensor in tensors.items()}
    if spelling == "both":
        own = {key: tensor for key, tensor in tensors.items() if key.startswith("unet.")}
        texts = {key: tensor for key, tensor in tensors.items() if key not in own}
        return own | image_files.to_kohya(texts, ALPHAS)
    if spelling == "text_model":
        return {key.replace("text_encoder.", "text_encoder.text_model."): t for key, t in tensors.items()}
    return tensors


def _name_as_oldest(key: str) -> str:
    """Return a name in the first releases of diffusers, of the layers that these adapted."""
    for side, old in (("A", "down"), ("B", "up")):
        key = re.sub(rf"\.(to_[qkv])\.lora_{side}\.", rf".processor.\1_lora.{old}.", key)
        key = re.sub(rf"\.to_out\.0\.lora_{side}\.", rf".processor.to_out_lora.{old}.", key)
        key = re.sub(
            rf"encoder\.encoder(.*)\.([qkv]|out)_proj\.lora_{side}\.",
            rf"encoder.text_model.encoder\1.to_\2_lora.{old}.",
            key,
        )
    return key


@pytest.mark.medium(
    "test_kohya.py, and three other spellings; each spelling alone; kohya's, and two others",
    cases=["kohya", "mixture", "peft"],
)
@pytest.mark.parametrize("spelling", ["peft", "mixture", "text_model", "oldest", "kohya", "both"])
def test_reads_all_tensors_of_every_spelling(
    spelling: str, pair: dict[str, Any], adapted: dict[str, Any], tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    file = _spell(spelling, tensors)
    metadata = {} if spelling == "kohya" else _describe(adapted)
    save_file(file, tmp_path / "style.safetensors", metadata)
    adapter = load_adapter(tmp_path / "style.safetensors", pair)
    assert len(adapter.tensors) == len(tensors) / 2 == 94
    if spelling in {"mixture", "kohya"}:
        _check_outputs(pair, adapted, tmp_path / "style.safetensors")
    for key, tensor in tensors.items():
        path, _, leaf = key.removesuffix(".weight").rpartition(".")
        assert torch.equal(adapter.tensors[path][leaf], tensor.flatten(1)), key
    variant = adapter.variant.at_path("unet.conv_in"), adapter.variant.at_path("text_encoder.encoder.layers.0.mlp.fc1")
    assert [(one.r, one.alpha) for one in variant] == [(4, 8), (2, 1)]


def test_diffusers_reads_saved_files(
    pair: dict[str, Any], adapted: dict[str, Any], tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """diffusers' reader, of a file with PEFT's names alone, finds every module and every scale."""
    save_file(image_files.to_mixture(tensors), tmp_path / "a.safetensors", _describe(adapted))
    adapter = load_adapter(tmp_path / "a.safetensors", pair)
    save_adapter(adapter, tmp_path / "b.safetensors", "diffusers", pair)
    from diffusers import StableDiffusionPipeline

    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
        str(tmp_path / "b.safetensors"), return_lora_metadata=True
    )
    unet = copy.deepcopy(pair["unet"])
    StableDiffusionPipeline.load_lora_into_unet(state, network_alphas=alphas, unet=unet, metadata=metadata)
    wanted = {name: t for name, t in adapted["unet"].named_parameters() if "lora_" in name}
    found = {name.replace("default_0", "default"): t for name, t in unet.named_parameters() if "lora_" in name}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert {module.scaling["default_0"] for module in unet.modules() if hasattr(module, "scaling")} == {2.0}


@pytest.mark.medium("test_diffusers_reads_saved_files, and every spelling is read")
@pytest.mark.parametrize("use_dora", [False, True])
def test_round_trips(use_dora: bool, pair: dict[str, Any], tmp_path: Path) -> None:
    """PEFT -> kohya -> diffusers -> PEFT."""
    tensors = image_files.peft_tensors(image_files.adapt_with_peft(pair, use_dora=use_dora))
    file = image_files.to_kohya(tensors, ALPHAS)
    for key, tensor in file.items():
        if key.endswith("dora_scale"):
            file[key] = tensor.reshape(-1, *(1,) * (file[key.replace("dora_scale", "lora_down.weight")].ndim - 1))
    save_file({key: tensor.contiguous() for key, tensor in file.items()}, tmp_path / "a.safetensors")
    first = load_adapter(tmp_path / "a.safetensors", pair)
    assert first.variant.name == ("dora" if use_dora else "lora")
    previous = first
    for number, format in enumerate(("diffusers", "kohya", "peft", "diffusers")):
        save_adapter(previous, tmp_path / f"{number}", format, pair)
        previous = load_adapter(tmp_path / f"{number}", pair)
        assert_equal(previous, first)
        for path in first.tensors:
            one, other = first.variant.at_path(path), previous.variant.at_path(path)
            assert (one.r, one.scale) == (other.r, other.scale)


def test_several_components_want_their_models(
    pair: dict[str, Any], tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(lorac.BaseNeeded, match="only the model tells which modules"):
        load_adapter(tmp_path / "a.safetensors")
    with pytest.raises(lorac.FormatError, match="several models of a pipeline, text_encoder and unet"):
        load_adapter(tmp_path / "a.safetensors", pair["unet"])
    with pytest.raises(lorac.FormatError, match="pipeline's text_encoder, which is not one of the models"):
        load_adapter(tmp_path / "a.safetensors", {"unet": pair["unet"]})
    alone = {key: tensor for key, tensor in tensors.items() if key.startswith("unet.")}
    save_file(alone, tmp_path / "b.safetensors")
    one = load_adapter(tmp_path / "b.safetensors", pair["unet"])
    assert len(one.tensors) == len(alone) / 2
    save_adapter(one, tmp_path / "c.safetensors", "diffusers", pair["unet"])
    assert load_file(tmp_path / "c.safetensors").keys() == alone.keys()


def _without_down(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != "unet.conv_in.lora_A.weight"}


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        (_without_down, "corrupt_file", "lora_down"),
        (lambda t: t | {"unet.conv_in.lora_C.weight": torch.ones(2)}, "unused_tensors", "lora_C"),
        (lambda t: t | {"vae.conv_in.lora_A.weight": torch.ones(2)}, "unused_tensors", "vae"),
        (lambda t: t | {"unet.conv_on.lora_A.weight": torch.ones(2, 2)}, "site_not_found", "conv_on"),
        (lambda t: t | {"unet.conv_in.lora.up.weight": torch.ones(2, 2)}, None, "lora.up"),
        (lambda t: t | {"unet.conv_in.alpha": torch.ones(2)}, "shape_mismatch", "alpha"),
        (
            lambda t: (
                t | {"unet.conv_out.lora_A.weight": t["unet.conv_out.lora_A.weight"].transpose(0, 1).contiguous()}
            ),
            "shape_mismatch",
            "conv_out",
        ),
    ],
)
def test_rejects_unused_tensors_by_name(
    change: Any, code: str | None, named: str, pair: dict[str, Any], tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_file(change(dict(tensors)), tmp_path / "a.safetensors")
    with pytest.raises(lorac.LoracError, match=named) as error:
        load_adapter(tmp_path / "a.safetensors", pair)
    assert code is None or error.value.code == code


@pytest.mark.medium("test_kohya.py: the text encoders of Stable Diffusion XL")
@pytest.mark.parametrize("format", ["native", "peft", "diffusers", "kohya"])
def test_several_models_are_given_by_name_everywhere(format: str, pair: dict[str, Any], tmp_path: Path) -> None:
    """One file, one adapter, of which compile() takes the path."""
    made = lorac.compile(pair, {"a": lorac.LoRA(r=2, targets=["to_q", "q_proj", "conv1"])}).adapters["a"]
    for tensor in made.parameters():
        tensor.data.normal_()
    assert made.tensors.keys() < lorac.sites(pair).keys()
    assert lorac.factors(made, pair).keys() == lorac.to_lora(made, pair, rank=1).tensors.keys() == made.tensors.keys()
    save_adapter(made, tmp_path / "a", format, pair)
    again = load_adapter(tmp_path / "a", pair)
    assert_equal(again, made)
    assert_equal(lorac.compile(pair, {"a": str(tmp_path / "a")}).adapters["a"], made)
    with pytest.raises(lorac.WrongType, match="the model 'text_encoder' is None"):
        load_adapter(tmp_path / "a", {"unet": pair["unet"], "text_encoder": None})
