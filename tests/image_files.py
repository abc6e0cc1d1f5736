"""Adapter files of image models as their own libraries write them, and the models that they are for."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import peft
import torch
from torch import Tensor, nn

from examples.pipelines import tiny_unet

WIDTH = 16
UNET_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_in", "conv_out", "proj_in", "proj_out", "ff.net.0.proj",
    "ff.net.2", "time_emb_proj", "linear_1", "conv_shortcut", "conv",
)  # fmt: skip
"""Ends of the paths of all of a U-Net's layers that trainers of LoRAs adapt."""
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def make_pair() -> dict[str, Any]:
    """Return a U-Net and CLIP's text encoder, the same every time."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.CLIPTextConfig(
            vocab_size=64, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        return {"unet": tiny_unet(WIDTH), "text_encoder": transformers.CLIPTextModel(config).eval()}


def make_sdxl_unet() -> Any:
    """Return a U-Net with the configuration of Stable Diffusion XL's, but its sizes."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(8, 16, 16),
            layers_per_block=2,
            norm_num_groups=4,
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
            transformer_layers_per_block=(1, 1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        ).eval()


def run_pair(pair: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return what a U-Net and a text encoder compute, of the same inputs every time."""
    generator, dtype = torch.Generator().manual_seed(1), pair["unet"].dtype
    latents = torch.randn(2, 4, 16, 16, generator=generator).to(dtype)
    tokens = torch.arange(14).reshape(2, 7) + 3
    with torch.no_grad():
        states = pair["text_encoder"](input_ids=tokens).last_hidden_state
        return pair["unet"](latents, torch.tensor(400), encoder_hidden_states=states).sample, states


def adapt_with_peft(pair: Mapping[str, Any], **fields: Any) -> dict[str, nn.Module]:
    """Return copies of the models with PEFT's LoRAs in place, at random values."""
    made, generator = {}, torch.Generator().manual_seed(2)
    for component, targets, sizes in (
        ("unet", UNET_TARGETS, {"r": 4, "lora_alpha": 8}),
        ("text_encoder", TEXT_TARGETS, {"r": 2, "lora_alpha": 1}),
    ):
        size = 0.04 if component == "unet" else 0.2
        config = peft.LoraConfig(target_modules=list(targets), **sizes, **fields)
        made[component] = peft.inject_adapter_in_model(config, copy.deepcopy(pair[component]))
        for name, tensor in made[component].named_parameters():
            if "lora_" in name:
                noise = torch.randn(tensor.shape, generator=generator) * size
                tensor.data = noise + 1 if "magnitude" in name else noise
    return made


def peft_tensors(adapted: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the tensors of all components by PEFT's names behind theirs."""
    return {
        f"{component}.{key}": tensor
        for component, model in adapted.items()
        for key, tensor in peft.get_peft_model_state_dict(model).items()
    }


def to_mixture(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors in the three spellings that diffusers' own writer mixes."""
    from diffusers.utils import convert_state_dict_to_diffusers

    written: dict[str, Tensor] = {}
    for component in ("unet", "text_encoder"):
        own = {k.removeprefix(f"{component}."): t for k, t in tensors.items() if k.startswith(f"{component}.")}
        written |= {f"{component}.{k}": t for k, t in convert_state_dict_to_diffusers(own).items()}
    return written


def to_kohya(tensors: Mapping[str, Tensor], alphas: Mapping[str, float]) -> dict[str, Tensor]:
    """Return the tensors as sd-scripts names them, with alphas by component."""
    written = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(r"(unet|text_encoder)\.(.+)\.lora_(A\.weight|B\.weight|magnitude_vector)", key)
        assert found is not None, key
        component, path, side = found.groups()
        beginning = "lora_unet_" if component == "unet" else "lora_te_text_model_"
        module = beginning + path.replace(".", "_")
        leaf = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}.get(side, "dora_scale")
        written[f"{module}.{leaf}"] = tensor
        written[f"{module}.alpha"] = torch.tensor(alphas[component])
    return written
