"""Toy pipelines of diffusers, of the kinds that people adapt: a few thousand weights, the same every time.

    from examples import pipelines

    pipeline = pipelines.build("stable_diffusion_xl", folder)

They paint noise. ``folder`` gets the files of a tokenizer of single letters.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TOKENS, WIDTH = 12, 16
"""Most tokens of a prompt, and the width of the text encoders."""


def tiny_unet(text_width: int, **fields: Any) -> Any:
    """diffusers' U-Net of a few thousand weights, for latents (4, 16, 16); drawn from the caller's seed."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=text_width,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **fields,
    ).eval()


def tiny_vae() -> Any:
    """The autoencoder that makes images of those latents; drawn from the caller's seed."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    ).eval()


def tokenizer(folder: Path) -> Any:
    """CLIP's, of single letters."""
    import transformers

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    return transformers.CLIPTokenizer(*files, model_max_length=TOKENS)


def clip(words: Any, *, projects: bool = False) -> Any:
    """CLIP's text encoder for a tokenizer."""
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=WIDTH,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    cls = transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel
    return cls(config).eval()


def t5(words: Any, width: int) -> Any:
    import transformers

    config = transformers.T5Config(
        vocab_size=len(words), d_model=width, d_kv=6, d_ff=24, num_layers=2, num_heads=2, use_cache=False
    )
    return transformers.T5EncoderModel(config).eval()


def flow_vae(channels: int) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4,),
        latent_channels=channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    ).eval()


def stable_diffusion(folder: Path) -> Any:
    import diffusers

    words = tokenizer(folder)
    unet, vae = tiny_unet(WIDTH), tiny_vae()
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=clip(words),
        tokenizer=words,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(folder: Path) -> Any:
    import diffusers

    words = tokenizer(folder)
    unet = tiny_unet(
        2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
    )
    vae = tiny_vae()
    return diffusers.StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=clip(words),
        text_encoder_2=clip(words, projects=True),
        tokenizer=words,
        tokenizer_2=words,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def flux(folder: Path) -> Any:
    import diffusers

    words = tokenizer(folder)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH + 4,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    )
    return diffusers.FluxPipeline(
        vae=flow_vae(1),
        text_encoder=clip(words),
        text_encoder_2=t5(words, WIDTH + 4),
        tokenizer=words,
        tokenizer_2=words,
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def stable_diffusion_3(folder: Path) -> Any:
    import diffusers

    words = tokenizer(folder)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_projection_dim=24,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
        out_channels=4,
        pos_embed_max_size=32,
    )
    return diffusers.StableDiffusion3Pipeline(
        vae=flow_vae(4),
        text_encoder=clip(words, projects=True),
        text_encoder_2=clip(words, projects=True),
        text_encoder_3=t5(words, 2 * WIDTH),
        tokenizer=words,
        tokenizer_2=words,
        tokenizer_3=words,
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


KINDS: dict[str, Callable[[Path], Any]] = {
    made.__name__: made for made in (stable_diffusion, stable_diffusion_xl, flux, stable_diffusion_3)
}


def build(kind: str, folder: str | Path) -> Any:
    """Return a pipeline of a kind; ``folder`` gets the tokenizer's files."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = KINDS[kind](Path(folder))
    made.set_progress_bar_config(disable=True)
    return made
