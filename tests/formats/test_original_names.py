"""Modules by their authors' names: Flux and SD3, whose layers are several of diffusers'; Wan, by its converters."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorac
from lorac import load_adapter, save_adapter
from lorac.formats._image_files.converters import name_loader
from lorac.formats._image_files.original_names import find_original_names
from tests.formats.oracle import assert_equal

diffusers = pytest.importorskip("diffusers")
FLUX_WIDTH = 3072
"""The width that is written into diffusers' converters for Flux."""


def _flux(heads: int, size: int) -> Any:
    return diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=size, num_attention_heads=heads,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(2, 2, size - 4), guidance_embeds=True,
    )  # fmt: skip


@functools.cache
def tiny_flux() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _flux(2, 8).eval()


def _linears(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]


def _draw(model: Any, variant: Any) -> lorac.Adapter:
    adapter = lorac.compile(model, {"a": variant}).adapters["a"]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return adapter


@pytest.mark.medium("DoRA", cases=["LoRA"])
@pytest.mark.parametrize("method", [lorac.LoRA, lorac.DoRA])
def test_layers_of_flux_are_joined_and_taken_apart(method: Any, tmp_path: Path) -> None:
    model = tiny_flux()
    adapter = _draw(model, method(r=2, alpha=4, targets=tuple(_linears(model))))
    save_adapter(adapter, tmp_path / "a.safetensors", "kohya", model)
    file = load_file(tmp_path / "a.safetensors")
    assert file["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"].shape == (6, 16)
    assert file["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"].shape == (48, 6)
    assert file["lora_unet_single_blocks_0_linear1.alpha"] == 16
    assert_equal(load_adapter(tmp_path / "a.safetensors", model), adapter)
    save_adapter(adapter, tmp_path / "b.safetensors", "diffusers", model)
    again = load_adapter(tmp_path / "b.safetensors", model)
    assert_equal(again, adapter)


def test_a_layer_of_flux_of_which_a_part_is_adapted(tmp_path: Path) -> None:
    model = tiny_flux()
    adapter = _draw(model, lorac.LoRA(r=2, targets=["attn.to_k", "proj_mlp"]))
    save_adapter(adapter, tmp_path / "a.safetensors", "kohya", model)
    assert_equal(load_adapter(tmp_path / "a.safetensors", model), adapter)


def test_names_of_flux_are_those_of_diffusers_converter(tmp_path: Path) -> None:
    """Of the same file, the same change of every layer, of a model of which only the shapes exist."""
    from diffusers.loaders import FluxLoraLoaderMixin

    with torch.device("meta"):
        model = _flux(24, 128)
    view = tiny_flux()
    names = _authors_names(view)
    shapes = {path: module.weight.shape for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    file, generator = {}, torch.Generator().manual_seed(1)
    for name, paths in names.items():
        module = "lora_unet_" + name.replace(".", "_")
        rows, columns = sum(shapes[path][0] for path in paths), shapes[paths[0]][1]
        file[f"{module}.lora_down.weight"] = torch.randn(1, columns, generator=generator)
        file[f"{module}.lora_up.weight"] = torch.randn(rows, 1, generator=generator)
        file[f"{module}.alpha"] = torch.tensor(0.25)
    assert {path for paths in names.values() for path in paths} == set(shapes)
    save_file(file, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors", model)
    theirs = FluxLoraLoaderMixin.lora_state_dict(dict(file))
    for path, tensors in adapter.tensors.items():
        # Of the last two layers the converter leaves out alpha; of them and the embedders the component, so that its
        # reader leaves out the layers.
        scale = 1.0 if path in {"norm_out.linear", "proj_out"} else 0.25
        prefix = "transformer." if f"transformer.{path}.lora_A.weight" in theirs else ""
        a, b = (theirs[f"{prefix}{path}.lora_{side}.weight"] for side in "AB")
        assert torch.equal(b * a[0, 0], tensors["lora_B"] * scale * tensors["lora_A"][0, 0]), path


def _authors_names(model: Any) -> dict[str, tuple[str, ...]]:
    return {name: place.paths for name, place in find_original_names(model).items()}


def test_rows_of_sd3_are_those_of_diffusers_converter(tmp_path: Path) -> None:
    """Differences of weights are taken apart as diffusers takes apart the weights of a whole checkpoint."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        caption_projection_dim=16, joint_attention_dim=12, pooled_projection_dim=10, out_channels=4,
        pos_embed_max_size=8, dual_attention_layers=(0,),
    )  # fmt: skip
    shapes = {path: m.weight.shape for path, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    checkpoint: dict[str, Tensor] = {}
    for name, paths in _authors_names(model).items():
        rows = sum(shapes[path][0] for path in paths)
        checkpoint[f"{name}.weight"] = torch.randn(rows, *shapes[paths[0]][1:])
        checkpoint[f"{name}.bias"] = torch.randn(rows)
    file = {
        f"lora_unet_{key[:-7].replace('.', '_')}.diff": t.clone() for key, t in checkpoint.items() if key.endswith("t")
    }
    save_file(file, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors", model)
    assert adapter.tensors.keys() == shapes.keys()
    theirs = convert_sd3_transformer_checkpoint_to_diffusers({"pos_embed": torch.zeros(1), **checkpoint})
    for path, tensors in adapter.tensors.items():
        assert torch.equal(tensors["delta"], theirs[f"{path}.weight"].flatten(1)), path


def test_a_lokr_of_a_joined_layer_is_an_edit(tmp_path: Path) -> None:
    model = tiny_flux()
    w1, w2 = torch.randn(6, 4), torch.randn(8, 4)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file({f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2}, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors", model)
    paths = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    assert torch.equal(torch.cat([adapter.tensors[path]["delta"] for path in paths]), torch.kron(w1, w2))


# ── diffusers' converters ────────────────────────────────────────────────────────────────────────────────────────────
@functools.cache
def tiny_wan() -> Any:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=16,
    )  # fmt: skip


def _pair(module: str, size: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(module))
    a, b = (torch.randn(shape, generator=generator) for shape in ((2, size), (size, 2)))
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def test_wan(tmp_path: Path) -> None:
    pair = _pair("diffusion_model.blocks.0.self_attn.q")
    alpha = {"diffusion_model.blocks.0.self_attn.q.alpha": torch.tensor(1.0)}
    file = {**pair, **_pair("diffusion_model.blocks.1.cross_attn.o")}
    save_file(file | alpha, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors", tiny_wan())
    assert set(adapter.tensors) == {"blocks.0.attn1.to_q", "blocks.1.attn2.to_out.0"}
    a, b = pair.values()
    found = adapter.tensors["blocks.0.attn1.to_q"]
    assert torch.equal(found["lora_B"] @ found["lora_A"], 0.5 * (b @ a))


@pytest.mark.parametrize(
    "left_out",
    [
        "diffusion_model.blocks.0.norm3.diff",
        "diffusion_model.blocks.0.junk.weight",
        "diffusion_model.blocks.0.self_attn.k.alpha",
    ],
)
def test_rejects_tensors_that_a_converter_leaves_out(left_out: str, tmp_path: Path) -> None:
    value = torch.tensor(1.0) if left_out.endswith("alpha") else torch.ones(16)
    save_file(_pair("diffusion_model.blocks.0.self_attn.q") | {left_out: value}, tmp_path / "a.safetensors")
    with pytest.raises(lorac.FormatError) as error:
        load_adapter(tmp_path / "a.safetensors", tiny_wan())
    assert left_out in str(error.value)


def test_xlabs(tmp_path: Path) -> None:
    """Names without a component; queries, keys and values are taken apart by widths that the converter knows."""
    with torch.device("meta"):
        model = _flux(24, 128)
    down, up = torch.randn(1, FLUX_WIDTH), torch.randn(3 * FLUX_WIDTH, 1)
    name = "double_blocks.0.processor.qkv_lora1"
    save_file({f"{name}.down.weight": down, f"{name}.up.weight": up}, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors", model)
    found = [adapter.tensors[f"transformer_blocks.0.attn.to_{part}"] for part in "qkv"]
    assert torch.equal(torch.cat([tensors["lora_B"] for tensors in found]), up)
    assert all(torch.equal(tensors["lora_A"], down) for tensors in found)
    other = "double_blocks.0.processor.other_lora"
    file = {f"{name}.down.weight": down, f"{name}.up.weight": up, f"{other}.down.weight": torch.ones(2, 2)}
    save_file(file, tmp_path / "a.safetensors")
    with pytest.raises(lorac.SiteError, match="other_lora"):
        load_adapter(tmp_path / "a.safetensors", model)


def test_each_transformer_has_its_loader() -> None:
    """The names of diffusers' loaders follow from those of its transformers, as its pipelines put them together."""
    from diffusers import loaders

    wrong, seen = [], set()
    for file in (Path(diffusers.__file__).parent / "pipelines").rglob("pipeline_*.py"):
        text = file.read_text()
        for bases in re.finditer(r"^class \w+\(([^)]*)\):", text, re.MULTILINE):
            mixin = re.search(r"\w+LoraLoaderMixin", bases[1])
            model = re.search(r"def __init__\([^)]*?transformer: (\w+Transformer\w*)", text[bases.end() :])
            if mixin and model:
                seen.add(mixin[0])
                wrong += [model[1]] if name_loader(model[1]) != mixin[0] else []
    assert wrong == []
    assert len(seen) > 20
    assert all(hasattr(loaders, name) for name in seen)
