"""The names that models of diffusers have in their authors' code, by which sd-scripts and others call their modules.

U-Nets are named by Latent Diffusion's code (https://github.com/CompVis/latent-diffusion), which numbers the
blocks of all stages together. In the transformers of Flux and SD3, one layer of the authors may be several layers of
diffusers', its rows one after another.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

from torch import nn


@dataclass(frozen=True)
class Place:
    """The layers that a module of a file stands for.

    Attributes:
        paths: their paths in the model, in the order of their rows in the module.
        swapped: the halves of the rows are exchanged.
    """

    paths: tuple[str, ...]
    swapped: bool = False


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OF_UNET = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
_EMBEDDERS = {
    "in_layer": "linear_1",
    "out_layer": "linear_2",
}
_TEMPLATES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "FluxTransformer2DModel": {
        "double_blocks.#.img_attn.qkv": tuple(f"transformer_blocks.#.attn.to_{part}" for part in "qkv"),
        "double_blocks.#.txt_attn.qkv": tuple(f"transformer_blocks.#.attn.add_{part}_proj" for part in "qkv"),
        "double_blocks.#.img_attn.proj": ("transformer_blocks.#.attn.to_out.0",),
        "double_blocks.#.txt_attn.proj": ("transformer_blocks.#.attn.to_add_out",),
        "double_blocks.#.img_mlp.0": ("transformer_blocks.#.ff.net.0.proj",),
        "double_blocks.#.img_mlp.2": ("transformer_blocks.#.ff.net.2",),
        "double_blocks.#.txt_mlp.0": ("transformer_blocks.#.ff_context.net.0.proj",),
        "double_blocks.#.txt_mlp.2": ("transformer_blocks.#.ff_context.net.2",),
        "double_blocks.#.img_mod.lin": ("transformer_blocks.#.norm1.linear",),
        "double_blocks.#.txt_mod.lin": ("transformer_blocks.#.norm1_context.linear",),
        "single_blocks.#.linear1": (
            *(f"single_transformer_blocks.#.attn.to_{part}" for part in "qkv"),
            "single_transformer_blocks.#.proj_mlp",
        ),
        "single_blocks.#.linear2": ("single_transformer_blocks.#.proj_out",),
        "single_blocks.#.modulation.lin": ("single_transformer_blocks.#.norm.linear",),
        "img_in": ("x_embedder",),
        "txt_in": ("context_embedder",),
        **{f"time_in.{n}": (f"time_text_embed.timestep_embedder.{m}",) for n, m in _EMBEDDERS.items()},
        **{f"guidance_in.{n}": (f"time_text_embed.guidance_embedder.{m}",) for n, m in _EMBEDDERS.items()},
        **{f"vector_in.{n}": (f"time_text_embed.text_embedder.{m}",) for n, m in _EMBEDDERS.items()},
        "final_layer.linear": ("proj_out",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    },
    "SD3Transformer2DModel": {
        "joint_blocks.#.x_block.attn.qkv": tuple(f"transformer_blocks.#.attn.to_{part}" for part in "qkv"),
        "joint_blocks.#.x_block.attn2.qkv": tuple(f"transformer_blocks.#.attn2.to_{part}" for part in "qkv"),
        "joint_blocks.#.context_block.attn.qkv": tuple(f"transformer_blocks.#.attn.add_{part}_proj" for part in "qkv"),
        "joint_blocks.#.x_block.attn.proj": ("transformer_blocks.#.attn.to_out.0",),
        "joint_blocks.#.x_block.attn2.proj": ("transformer_blocks.#.attn2.to_out.0",),
        "joint_blocks.#.context_block.attn.proj": ("transformer_blocks.#.attn.to_add_out",),
        "joint_blocks.#.x_block.mlp.fc1": ("transformer_blocks.#.ff.net.0.proj",),
        "joint_blocks.#.x_block.mlp.fc2": ("transformer_blocks.#.ff.net.2",),
        "joint_blocks.#.context_block.mlp.fc1": ("transformer_blocks.#.ff_context.net.0.proj",),
        "joint_blocks.#.context_block.mlp.fc2": ("transformer_blocks.#.ff_context.net.2",),
        "joint_blocks.#.x_block.adaLN_modulation.1": ("transformer_blocks.#.norm1.linear",),
        "joint_blocks.#.context_block.adaLN_modulation.1": ("transformer_blocks.#.norm1_context.linear",),
        "x_embedder.proj": ("pos_embed.proj",),
        "context_embedder": ("context_embedder",),
        "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
        "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
        "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
        "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
        "final_layer.linear": ("proj_out",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    },
}
"""Class of the model -> the authors' name of a layer -> diffusers' names of its rows; # is the number of a block."""
_XLABS: Mapping[str, tuple[str, ...]] = {
    "double_blocks.#.qkv_lora1": _TEMPLATES["FluxTransformer2DModel"]["double_blocks.#.img_attn.qkv"],
    "double_blocks.#.qkv_lora2": _TEMPLATES["FluxTransformer2DModel"]["double_blocks.#.txt_attn.qkv"],
    "double_blocks.#.proj_lora1": ("transformer_blocks.#.attn.to_out.0",),
    "double_blocks.#.proj_lora2": ("transformer_blocks.#.attn.to_add_out",),
    "single_blocks.#.qkv_lora": tuple(f"single_transformer_blocks.#.attn.to_{part}" for part in "qkv"),
    "single_blocks.#.proj_lora": ("single_transformer_blocks.#.proj_out",),
}
"""Names of XLabs' files for Flux, which name a LoRA instead of its layer."""
_CONTINUOUS = "AdaLayerNormContinuous"
"""diffusers' class of a norm whose linear layer has scale before shift, where the authors' has shift before scale."""


def find_original_names(model: nn.Module) -> dict[str, Place]:
    """Return the authors' name of each module of a model -> its place; empty for models that have no other names."""
    modules = dict(model.named_modules())
    if "UNet2DConditionModel" in {cls.__name__ for cls in type(model).__mro__}:
        return dict(_list_unet_names(modules))
    return _list_template_names(_TEMPLATES.get(type(model).__name__, {}), modules)


def find_other_names(model: nn.Module) -> dict[str, Place]:
    """Return further names that files may have; lorac writes none of them."""
    is_flux = type(model).__name__ == "FluxTransformer2DModel"
    return _list_template_names(_XLABS, dict(model.named_modules())) if is_flux else {}


def prefers_original_names(model: nn.Module) -> bool:
    """Return whether sd-scripts calls a model's modules by their authors' names: SDXL's, and those of transformers."""
    config = getattr(model, "config", {})
    return type(model).__name__ in _TEMPLATES or getattr(config, "addition_embed_type", None) == "text_time"


def _list_template_names(
    templates: Mapping[str, tuple[str, ...]], modules: Mapping[str, nn.Module]
) -> dict[str, Place]:
    named: dict[str, Place] = {}
    for name, layers in templates.items():
        first = re.compile(re.escape(layers[0]).replace("\\#", r"(?P<number>\d+)"))
        numbers = [str(found.groupdict().get("number")) for path in modules if (found := first.fullmatch(path))]
        for number in numbers:
            paths = tuple(layer.replace("#", number) for layer in layers)
            owner = modules[paths[0].rpartition(".")[0]]
            named[name.replace("#", number)] = Place(paths, swapped=type(owner).__name__ == _CONTINUOUS)
    return {name: place for name, place in named.items() if modules.keys() >= set(place.paths)}


def _list_unet_names(modules: Collection[str]) -> Iterator[tuple[str, Place]]:
    counts = {}  # of residual blocks in each stage of a side
    for side in ("down", "up"):
        block = re.compile(rf"{side}_blocks\.(\d+)\.resnets\.\d+")
        stages = Counter(int(found[1]) for path in modules if (found := block.fullmatch(path)))
        counts[side] = [stages[stage] for stage in range(max(stages, default=-1) + 1)]
    firsts = {
        "down": list(accumulate((count + 1 for count in counts["down"]), initial=1)),
        "up": list(accumulate(counts["up"], initial=0)),
    }
    for path in modules:
        if path in _OF_UNET:
            yield _OF_UNET[path], Place((path,))
        elif found := _MIDDLE.fullmatch(path):
            kind, index, rest = found.groups()
            number = 2 * int(index) if kind == "resnets" else 1
            yield f"middle_block.{number}.{_name_in_block(kind, rest)}", Place((path,))
        elif found := _BLOCK.fullmatch(path):
            side, stage, kind, index, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
            within = index if not kind.endswith("samplers") else counts[side][stage] - (side == "up")
            number = firsts[side][stage] + within
            below = {"resnets": "0", "attentions": "1", "downsamplers": "0"}
            part = below.get(kind, "2" if f"up_blocks.{stage}.attentions" in modules else "1")
            inner = _name_in_block(kind, rest)
            yield f"{'input' if side == 'down' else 'output'}_blocks.{number}.{part}.{inner}", Place((path,))


def _name_in_block(kind: str, rest: str) -> str:
    """Return the authors' name of a module within one of a U-Net's residual blocks, attentions or resamplers."""
    named = {"resnets": _RESNET, "downsamplers": {"conv": "op"}}.get(kind, {})
    return named.get(rest, rest)
