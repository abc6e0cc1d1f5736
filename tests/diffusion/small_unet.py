"""The smallest U-Net of diffusers with cross- and self-attention at two resolutions, and inputs for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

WIDTH, TOKENS, HEADS = 12, 5, 2


def small_unet(**fields: Any) -> Any:
    """A U-Net for latents (4, 8, 8): cross-attention at 8 x 8 and in the middle at 4 x 4; the same every time."""
    from diffusers import UNet2DConditionModel

    sizes: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": HEADS,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel(**sizes | fields).eval().requires_grad_(False)


def small_unet_xl() -> Any:
    """Return a U-Net that is conditioned on a pooled embedding and on sizes, as SDXL's is."""
    sizes = {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": WIDTH + 6 * 4}
    return small_unet(addition_embed_type="text_time", **sizes)


def prompt_xl(seed: int) -> Any:
    """Return a prompt for that."""
    from lorac.diffusion.scheduling import Prompt

    pooled = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    sizes = torch.tensor([64.0, 48.0, 0.0, 5.0 * seed, 64.0, 64.0])
    return Prompt(states(seed), added={"text_embeds": pooled, "time_ids": sizes})


def inputs(batch: int = 2, height: int = 8, width: int = 8, *, seed: int = 1) -> dict[str, Tensor]:
    """Latents, times and states of prompts."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 4, height, width, generator=generator),
        "timestep": torch.full((batch,), 400.0),
        "encoder_hidden_states": torch.randn(batch, TOKENS, WIDTH, generator=generator),
    }


def dynamic_shapes() -> dict[str, dict[int, Any]]:
    """Batch, height and width of any size."""
    auto = torch.export.Dim.AUTO
    return {"sample": {0: auto, 2: auto, 3: auto}, "timestep": {0: auto}, "encoder_hidden_states": {0: auto}}


def noisy(adapter: Any, *, seed: int = 0, size: float = 0.5) -> Any:
    """An adapter whose tensors are away from their start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor.normal_(0, size, generator=generator)
    return adapter


def scheduler() -> Any:
    """Return a scheduler of ordinary steps."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(clip_sample=False)


@torch.no_grad()
def sample_plainly(unet: Any, latents: Tensor, prompts: Sequence[Tensor], steps: int, **added: Any) -> Tensor:
    """Return what a model alone makes of noise under a prompt and a negative one, with guidance of 3."""
    times = scheduler()
    times.set_timesteps(steps)
    rows = torch.stack([prompt for prompt in prompts for _ in latents])
    for t in times.timesteps:
        told, plain = unet(latents.repeat(2, 1, 1, 1), t.float().expand(len(rows)), rows, **added).sample.chunk(2)
        latents = times.step(plain + 3.0 * (told - plain), t, latents).prev_sample
    return latents


def states(seed: int) -> Tensor:
    """Return the embeddings of a prompt (tokens, width)."""
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
