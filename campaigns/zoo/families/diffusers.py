"""diffusers' denoisers, tiny, in the shapes of the models that they are of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from campaigns.zoo.entries import Call, Entry

AUTO = torch.export.Dim.AUTO
UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
XL = {
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}
DIT = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 8, "sample_size": 8, "patch_size": 2}


class _Added(nn.Module):
    """SDXL's U-Net with its added conditions as arguments of their own: tensors alone can be freed of their sizes."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, states: Tensor, text: Tensor, ids: Tensor) -> Tensor:
        added = {"text_embeds": text, "time_ids": ids}
        answer: Tensor = self.unet(sample, timestep, states, added_cond_kwargs=added, return_dict=False)[0]
        return answer


def entries() -> list[Entry]:
    """U-Nets and transformers of images, video and sound."""
    return [
        Entry(f"diffusers/{name}", "diffusers", build, functools.partial(_call, made), None, _shapes)
        for name, (build, made) in MODELS.items()
    ]


def _of(kind: str, /, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import diffusers

        made: nn.Module = getattr(diffusers, kind)(**settings)
        return made.eval()

    return build


def _call(make: Callable[[_Draw], Call], model: nn.Module, batch: int, length: int, seed: int) -> Call:
    return make(_Draw(batch, length, torch.Generator().manual_seed(seed)))


def _shapes(call: Call) -> dict[str, Any]:
    """Rows of everything, and the length of a prompt."""
    long = {"encoder_hidden_states", "states", "encoder_attention_mask"}
    tensors = {name for name, value in call.items() if isinstance(value, Tensor)}
    return {name: dict.fromkeys((0, 1) if name in long else (0,), AUTO) if name in tensors else None for name in call}


class _Draw:
    """Numbers of a call of so many rows."""

    def __init__(self, batch: int, length: int, generator: torch.Generator) -> None:
        self.batch, self.length, self.generator = batch, length, generator

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, *shape, generator=self.generator)

    def time(self) -> Tensor:
        return torch.randint(1, 900, (self.batch,), generator=self.generator)


def _image(draw: _Draw, width: int | None = 24, channels: int = 4) -> dict[str, Any]:
    made = {"sample": draw.noise(channels, 8, 8), "timestep": draw.time()}
    return made if width is None else {**made, "encoder_hidden_states": draw.noise(draw.length, width)}


def _xl(draw: _Draw) -> Call:
    text, ids = draw.noise(16), draw.noise(6).abs().round()
    return {
        "sample": draw.noise(4, 8, 8),
        "timestep": draw.time(),
        "states": draw.noise(draw.length, 24),
        "text": text,
        "ids": ids,
    }


def _hidden(draw: _Draw, width: int, *shape: int, **more: Tensor) -> Call:
    made = {"hidden_states": draw.noise(*shape), "encoder_hidden_states": draw.noise(draw.length, width)}
    return {**made, "timestep": draw.time(), **more}


def _flux(draw: _Draw) -> Call:
    """Packed pixels, their places, the prompt and its places."""
    places = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(4.0), torch.arange(4.0), indexing="ij"), -1)
    made = _hidden(draw, 32, 16, 4, pooled_projections=draw.noise(32))
    return {
        **made,
        "timestep": draw.time() / 1000,
        "img_ids": places.reshape(16, 3),
        "txt_ids": torch.zeros(draw.length, 3),
    }


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[_Draw], Call]]] = {
    "sd15-unet": (_of("UNet2DConditionModel", **UNET), _image),
    "sd21-unet": (_of("UNet2DConditionModel", **UNET, use_linear_projection=True), _image),
    "sdxl-unet": (lambda: _Added(_of("UNet2DConditionModel", **{**UNET, **XL})()).eval(), _xl),
    "unconditional-unet": (
        _of(
            "UNet2DModel",
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            norm_num_groups=8,
            layers_per_block=1,
            attention_head_dim=4,
            down_block_types=("AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D"),
        ),
        lambda draw: _image(draw, None),
    ),
    "kandinsky-prior": (
        _of(
            "PriorTransformer",
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=2,
            embedding_dim=24,
            num_embeddings=7,
            additional_embeddings=4,
        ),
        lambda draw: {
            "hidden_states": draw.noise(24),
            "timestep": draw.time(),
            "proj_embedding": draw.noise(24),
            "encoder_hidden_states": draw.noise(7, 24),
        },
    ),
    "dit": (
        _of("DiTTransformer2DModel", **DIT, in_channels=4, out_channels=8, num_embeds_ada_norm=10, norm_num_groups=8),
        lambda draw: {"hidden_states": draw.noise(4, 8, 8), "timestep": draw.time(), "class_labels": draw.time() % 10},
    ),
    "pixart": (
        _of(
            "PixArtTransformer2DModel",
            **DIT,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=32,
            caption_channels=24,
            norm_num_groups=8,
            use_additional_conditions=False,
        ),
        lambda draw: _hidden(draw, 24, 4, 8, 8),
    ),
    "sana": (
        _of(
            "SanaTransformer2DModel",
            in_channels=4,
            out_channels=4,
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=4,
            cross_attention_head_dim=8,
            cross_attention_dim=32,
            caption_channels=24,
            sample_size=8,
        ),
        lambda draw: _hidden(draw, 24, 4, 8, 8),
    ),
    "sd3": (
        _of(
            "SD3Transformer2DModel",
            **DIT,
            in_channels=4,
            out_channels=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=24,
            pos_embed_max_size=8,
        ),
        lambda draw: _hidden(draw, 32, 4, 8, 8, pooled_projections=draw.noise(24)),
    ),
    "aura-flow": (
        _of(
            "AuraFlowTransformer2DModel",
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=24,
            caption_projection_dim=32,
            pos_embed_max_size=16,
        ),
        # It counts time from 0 to 1, and by a thousand itself: beyond that, the sines it makes of it are noise.
        lambda draw: _hidden(draw, 24, 4, 8, 8, timestep=draw.time() / 1000),
    ),
    "flux": (
        _of(
            "FluxTransformer2DModel",
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        ),
        _flux,
    ),
    "latte": (
        _of(
            "LatteTransformer3DModel",
            **DIT,
            in_channels=4,
            out_channels=8,
            caption_channels=24,
            cross_attention_dim=32,
            video_length=2,
        ),
        lambda draw: _hidden(draw, 24, 4, 2, 8, 8),
    ),
    "cogvideox": (
        _of(
            "CogVideoXTransformer3DModel",
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=24,
            num_layers=2,
            sample_width=8,
            sample_height=8,
            sample_frames=5,
            patch_size=2,
            temporal_compression_ratio=4,
            max_text_seq_length=7,
        ),
        lambda draw: {**_hidden(draw, 24, 2, 4, 8, 8), "encoder_hidden_states": draw.noise(7, 24)},
    ),
    "ltx-video": (
        _of(
            "LTXVideoTransformer3DModel",
            in_channels=4,
            out_channels=4,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=24,
        ),
        lambda draw: {
            **_hidden(draw, 24, 16, 4, encoder_attention_mask=torch.ones(draw.batch, draw.length, dtype=torch.int64)),
            "num_frames": 1,
            "height": 4,
            "width": 4,
        },
    ),
    "stable-audio": (
        _of(
            "StableAudioDiTModel",
            sample_size=8,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            num_key_value_attention_heads=2,
            out_channels=4,
            cross_attention_dim=24,
            time_proj_dim=8,
            global_states_input_dim=24,
            cross_attention_input_dim=24,
        ),
        lambda draw: {
            "hidden_states": draw.noise(4, 8),
            "timestep": draw.time() / 1000.0,
            "encoder_hidden_states": draw.noise(draw.length, 24),
            "global_hidden_states": draw.noise(1, 24),
        },
    ),
    "vae": (
        _of(
            "AutoencoderKL",
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(16, 32),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=16,
        ),
        lambda draw: {"sample": draw.noise(3, 16, 16)},
    ),
    "controlnet": (
        _of(
            "ControlNetModel",
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=24,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            conditioning_embedding_out_channels=(8, 16),
        ),
        lambda draw: {**_image(draw), "controlnet_cond": draw.noise(3, 16, 16), "conditioning_scale": 1.0},
    ),
}
"""name: (the model, its arguments)."""
