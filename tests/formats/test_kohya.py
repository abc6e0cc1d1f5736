"""Files of sd-scripts and LyCORIS, against LyCORIS's own forward and diffusers' names."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorac
from lorac import load_adapter, save_adapter
from lorac.testing import assert_close
from tests import image_files
from tests.formats.lycoris_cases import CASES
from tests.formats.oracle import assert_equal
from tests.parity import assert_parity
from tests.refusing import refuses

RECORDED = Path(__file__).parent / "lycoris.safetensors"


class Layers(nn.Module):
    """The two layers of the recorded cases."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(12, 16)

    def forward(self, conv: Tensor, fc: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs of both, of inputs of their own."""
        return self.conv(conv), self.fc(fc)


@functools.cache
def recorded() -> dict[str, Tensor]:
    return load_file(RECORDED)


def part(prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in recorded().items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def layers() -> Layers:
    made = Layers().eval()
    made.load_state_dict(part("model/"))
    return made


@pytest.mark.parametrize("case", CASES)
def test_lycoris(case: str, layers: Layers, tmp_path: Path) -> None:
    """The outputs are LyCORIS's, and the adapter comes back from its own file bit for bit."""
    save_file(part(f"{case}/file/"), tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors", layers)
    with torch.no_grad():
        found = lorac.compile(layers, {"a": adapter})(**part("input/"))
        base = layers(**part("input/"))
    assert_parity(found, tuple(part(f"{case}/output/").values()), base)
    save_adapter(adapter, tmp_path / "b.safetensors", "kohya", layers)
    again = load_adapter(tmp_path / "b.safetensors", layers)
    assert_equal(again, adapter)
    for path in adapter.tensors:
        one, other = (each.variant.at(lorac.sites(layers)[path]) for each in (adapter, again))
        assert one == other
    written, original = load_file(tmp_path / "b.safetensors"), part(f"{case}/file/")
    for name in written.keys() & original.keys() if case != "lora_tucker" else ():
        one, other = written[name].flatten(), original[name].flatten()
        bounded = case == "diag_oft_rescaled" and name.endswith(("alpha", "blocks"))
        if not bounded and not (case.startswith("lokr") and name.endswith("alpha")):
            assert_close(one.float(), other.float())


@pytest.mark.parametrize(("case", "is_lost"), [("lokr", True), ("glora", True), ("lora_rs", False)])
def test_check_names_a_scale_that_lycoris_did_not_write(
    case: str, is_lost: bool, layers: Layers, tmp_path: Path
) -> None:
    for metadata, said in (({"ss_network_args": '{"algo": "x", "rs_lora": "True"}'}, is_lost), ({}, False)):
        save_file(part(f"{case}/file/"), tmp_path / "a.safetensors", metadata)
        found = lorac.check(tmp_path / "a.safetensors", layers)
        assert found.fits
        assert ("rs_lora" in found.facts.get("scale", "")) == said


@pytest.mark.medium("three kinds of factors", keep=["lora", "loha", "boft"])
@pytest.mark.parametrize("case", CASES)
def test_rejects_added_renamed_and_missing_tensors(case: str, layers: Layers, tmp_path: Path) -> None:
    file = part(f"{case}/file/")
    optional = ("alpha", "rescale", "dora_scale", "diff_b", "diff")
    for name, tensor in file.items():
        changes = {
            "added": {**file, f"{name}_new": tensor.clone()},
            "renamed": {**file, name.replace("lycoris_", "lycoris_x"): tensor},
        }
        changes["renamed"].pop(name)
        if not name.endswith(optional) and not name.endswith("lora_mid.weight"):
            changes["removed"] = {key: value for key, value in file.items() if key != name}
        if tensor.ndim > 1 and len({*tensor.shape[:2]}) > 1:
            changes["transposed"] = {**file, name: tensor.transpose(0, 1).contiguous()}
        for what, changed in changes.items():
            save_file(changed, tmp_path / "a.safetensors")
            with pytest.raises(lorac.LoracError, match=r"conv|fc"):
                assert not load_adapter(tmp_path / "a.safetensors", layers), (what, name)


def _all_layers(model: nn.Module) -> dict[str, nn.Module]:
    kinds = (nn.Linear, nn.Conv2d)
    return {path: module for path, module in model.named_modules() if isinstance(module, kinds)}


@pytest.mark.medium("test_the_text_encoders_of_stable_diffusion_xl, and test_diffusers.py has a U-Net's")
def test_the_names_of_stable_diffusion_xl(tmp_path: Path) -> None:
    """All its layers by the names of the authors, as diffusers' own converter has them."""
    pytest.importorskip("diffusers")
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    unet = image_files.make_sdxl_unet()
    layers = _all_layers(unet)
    fresh = lorac.compile(unet, {"a": lorac.LoRA(r=2, alpha=1, targets=tuple(layers))}).adapters["a"]
    with torch.no_grad():
        for tensor in fresh.parameters():
            tensor.normal_()
    save_adapter(fresh, tmp_path / "a.safetensors", "kohya", unet)
    file = load_file(tmp_path / "a.safetensors")
    assert len(layers) == len(fresh.tensors) == len(file) / 3 == 263
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight" in file
    assert_equal(load_adapter(tmp_path / "a.safetensors", {"unet": unet}.get("unet")), fresh)
    converted = StableDiffusionXLLoraLoaderMixin.lora_state_dict(dict(file), unet_config=unet.config)[0]
    theirs = convert_unet_state_dict_to_peft({key.removeprefix("unet."): tensor for key, tensor in converted.items()})
    downs = {key.removesuffix(".lora_A.weight"): tensor for key, tensor in theirs.items() if "lora_A" in key}
    assert {path for path in downs if path in layers} >= {path for path in layers if "attn" in path}
    for path, tensor in downs.items():
        if path in layers:
            assert torch.equal(tensor.flatten(1), fresh.tensors[path]["lora_A"]), path


def test_the_text_encoders_of_stable_diffusion_xl(tmp_path: Path) -> None:
    import transformers

    pytest.importorskip("diffusers")
    config = transformers.CLIPTextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        projection_dim=8, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    models = {
        "unet": image_files.make_sdxl_unet(),
        "text_encoder": transformers.CLIPTextModel(config),
        "text_encoder_2": transformers.CLIPTextModelWithProjection(config),
    }
    fresh = lorac.compile(models, {"a": lorac.LoRA(r=2, targets=["conv_in", "fc1"])}).adapters["a"]
    save_adapter(fresh, tmp_path / "a.safetensors", "kohya", models)
    assert {name.partition(".")[0] for name in load_file(tmp_path / "a.safetensors")} == {
        "lora_unet_input_blocks_0_0",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "lora_te2_text_model_encoder_layers_0_mlp_fc1",
    }
    assert_equal(load_adapter(tmp_path / "a.safetensors", models), fresh)


def _lora(module: str, alpha: float | None, rank: int = 2) -> dict[str, Tensor]:
    tensors = {f"{module}.lora_down.weight": torch.ones(rank, 12), f"{module}.lora_up.weight": torch.ones(16, rank)}
    return tensors | ({} if alpha is None else {f"{module}.alpha": torch.tensor(alpha)})


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (0.0, 1.0), (1.0, 0.5), (-3.0, -1.5)])
def test_alpha_of_a_module_is_its_own(alpha: float | None, scale: float, tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(12, 16), "b": nn.Linear(12, 16)})
    save_file(_lora("lycoris_a", alpha) | _lora("lycoris_b", 8.0), tmp_path / "a.safetensors")
    variant = load_adapter(tmp_path / "a.safetensors", model).variant
    scales: Any = [variant.at_path(path).scale for path in ("a", "b")]
    assert scales == [scale, 4.0]


def test_rejects_a_scalar_instead_of_a_matrix(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(12, 16)})
    file = _lora("lycoris_a", None)
    for name in (*file, "lycoris_a.dora_scale"):
        save_file({**file, name: torch.tensor(1.0)}, tmp_path / "a.safetensors")
        with refuses("shape_mismatch", match=name.removesuffix(".weight")):
            load_adapter(tmp_path / "a.safetensors", model)


def test_rejects_an_alpha_without_factors(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(12, 16), "b": nn.Linear(12, 16)})
    save_file(_lora("lycoris_a", 1.0) | {"lycoris_b.alpha": torch.tensor(1.0)}, tmp_path / "a.safetensors")
    with pytest.raises(lorac.FormatError, match=r"lycoris_b\.alpha"):
        load_adapter(tmp_path / "a.safetensors", model)


def test_rejects_a_name_of_two_modules(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a_b": nn.Linear(12, 16), "a": nn.ModuleDict({"b": nn.Linear(12, 16)})})
    save_file(_lora("lycoris_a_b", None), tmp_path / "a.safetensors")
    with pytest.raises(lorac.FormatError, match=r"'a\.b' and 'a_b'"):
        load_adapter(tmp_path / "a.safetensors", model)


def test_norms_are_replaced(tmp_path: Path) -> None:
    """LyCORIS's differences of a norm, and of a bias next to a LoRA."""
    model = nn.ModuleDict({"norm": nn.LayerNorm(12), "fc": nn.Linear(12, 16)})
    file = _lora("lycoris_fc", None) | {
        "lycoris_fc.diff_b": torch.ones(16),
        "lycoris_norm.w_norm": torch.full((12,), 0.5),
    }
    save_file(file, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors", model)
    assert torch.equal(adapter.replaced["norm.weight"], torch.full((12,), 1.5))
    assert torch.equal(adapter.replaced["fc.bias"], model["fc"].bias.detach() + 1)
    save_adapter(adapter, tmp_path / "b.safetensors", "kohya", model)
    assert_equal(load_adapter(tmp_path / "b.safetensors", model), adapter)
