"""The names of modules in the original code of image models, which sd-scripts and other tools write in their files.

diffusers renames these modules. The original code of U-Nets is Latent Diffusion
(https://github.com/CompVis/latent-diffusion), which numbers the blocks of all stages together:

- ``input_blocks.0`` is ``conv_in``. Each down stage follows with one block per resnet, and ends with a block that holds
  its downsampler alone. The last stage has no downsampler.
- ``middle_block`` is a resnet, an attention and a resnet.
- ``output_blocks`` has one block per resnet of the up stages. An upsampler is in the last block of its stage.
- Within a block, the resnet (or downsampler) is part 0, the attention part 1, and the upsampler the last part.

In the transformers of Flux and SD3, diffusers may split one layer of the original code by rows into several layers.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

from torch import nn


@dataclass(frozen=True)
class Place:
    """The layers of a model that correspond to one module named in a file.

    Attributes:
        paths: paths of the layers in the model, in the order of their rows in the file's module.
        swapped: whether the file's module has the two halves of its rows in the other order.
    """

    paths: tuple[str, ...]
    swapped: bool = False


# Paths in diffusers -> names in Latent Diffusion: within a resnet, and outside the numbered blocks.
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE_BLOCKS = {
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
_EMBEDDERS = {"in_layer": "linear_1", "out_layer": "linear_2"}
# Class of the model -> the authors' name of a layer -> the paths of the layers that diffusers splits its rows into.
# "#" stands for the number of a block, which is the same in both.
TEMPLATES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
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
# Names in XLabs' files for Flux, which name a LoRA instead of its layer.
_XLABS: Mapping[str, tuple[str, ...]] = {
    "double_blocks.#.qkv_lora1": TEMPLATES["FluxTransformer2DModel"]["double_blocks.#.img_attn.qkv"],
    "double_blocks.#.qkv_lora2": TEMPLATES["FluxTransformer2DModel"]["double_blocks.#.txt_attn.qkv"],
    "double_blocks.#.proj_lora1": ("transformer_blocks.#.attn.to_out.0",),
    "double_blocks.#.proj_lora2": ("transformer_blocks.#.attn.to_add_out",),
    "single_blocks.#.qkv_lora": tuple(f"single_transformer_blocks.#.attn.to_{part}" for part in "qkv"),
    "single_blocks.#.proj_lora": ("single_transformer_blocks.#.proj_out",),
}
_SCALE_FIRST_NORM = "AdaLayerNormContinuous"
"""A norm of diffusers whose linear layer computes scale, then shift; the original layer computes shift, then scale."""


def find_original_names(model: nn.Module) -> dict[str, Place]:
    """Return the original name of each module of a model -> its place; empty if diffusers did not rename any."""
    modules = dict(model.named_modules())
    if "UNet2DConditionModel" in {cls.__name__ for cls in type(model).__mro__}:
        return dict(_list_unet_names(modules))
    return _list_template_names(TEMPLATES.get(type(model).__name__, {}), modules)


def find_other_names(model: nn.Module) -> dict[str, Place]:
    """Return further names that lorac reads from files but never writes (those of XLabs) -> their places."""
    is_flux = type(model).__name__ == "FluxTransformer2DModel"
    return _list_template_names(_XLABS, dict(model.named_modules())) if is_flux else {}


def _list_template_names(
    templates: Mapping[str, tuple[str, ...]], modules: Mapping[str, nn.Module]
) -> dict[str, Place]:
    """Return the original names of modules by templates; omit a name if the model lacks one of its layers."""
    places: dict[str, Place] = {}
    for name, layers in templates.items():
        # re.escape writes "#" as "\#". A template without "#" has no group, and its number replaces nothing.
        first_layer = re.compile(re.escape(layers[0]).replace(r"\#", r"(\d+)"))
        numbers = ["".join(match.groups()) for path in modules if (match := first_layer.fullmatch(path))]
        for number in numbers:
            paths = tuple(layer.replace("#", number) for layer in layers)
            parent = modules[paths[0].rpartition(".")[0]]
            places[name.replace("#", number)] = Place(paths, swapped=type(parent).__name__ == _SCALE_FIRST_NORM)
    return {name: place for name, place in places.items() if modules.keys() >= set(place.paths)}


def _list_unet_names(modules: Collection[str]) -> Iterator[tuple[str, Place]]:
    """Yield the Latent Diffusion name of each module of a U-Net, and its place; the top of this file has the layout."""
    resnets = {}  # side -> number of resnets in each stage
    for side in ("down", "up"):
        resnet = re.compile(rf"{side}_blocks\.(\d+)\.resnets\.\d+")
        counts = Counter(int(match[1]) for path in modules if (match := resnet.fullmatch(path)))
        resnets[side] = [counts[stage] for stage in range(max(counts, default=-1) + 1)]
    # The number of each stage's first block: conv_in is input block 0, and a downsampler has a block of its own.
    first_blocks = {
        "down": list(accumulate((count + 1 for count in resnets["down"]), initial=1)),
        "up": list(accumulate(resnets["up"], initial=0)),
    }
    for path in modules:
        if path in _OUTSIDE_BLOCKS:
            yield _OUTSIDE_BLOCKS[path], Place((path,))
        elif found := _MIDDLE.fullmatch(path):
            kind, index, rest = found.groups()
            part = 2 * int(index) if kind == "resnets" else 1
            yield f"middle_block.{part}.{_name_in_block(kind, rest)}", Place((path,))
        elif found := _BLOCK.fullmatch(path):
            side, stage, kind, index, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
            first, count = first_blocks[side][stage], resnets[side][stage]
            match kind:
                case "resnets":
                    block, part = first + index, 0
                case "attentions":
                    block, part = first + index, 1
                case "downsamplers":
                    block, part = first + count, 0
                case _:  # an upsampler
                    block, part = first + count - 1, 2 if f"up_blocks.{stage}.attentions" in modules else 1
            blocks = "input_blocks" if side == "down" else "output_blocks"
            yield f"{blocks}.{block}.{part}.{_name_in_block(kind, rest)}", Place((path,))


def _name_in_block(kind: str, rest: str) -> str:
    """Return the Latent Diffusion name of a module within a resnet, an attention, a downsampler or an upsampler."""
    return {"resnets": _RESNET, "downsamplers": {"conv": "op"}}.get(kind, {}).get(rest, rest)
