"""The schedulers of diffusers, as far as compositions use them."""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor


class StepResult(Protocol):
    """The result of a step: the latents that the next one begins with."""

    prev_sample: Tensor


class NoiseScheduler(Protocol):
    """A scheduler of diffusers, such as ``DDIMScheduler``."""

    timesteps: Tensor
    init_noise_sigma: float

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Choose the times of all steps."""

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Return latents as the model reads them at a time."""

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> StepResult:
        """Return the latents before a step, from what the model predicts."""


def call_rows(scheduler: NoiseScheduler, latents: Tensor, t: Tensor, prompts: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return a U-Net's arguments for latents (b, …) under each of some prompts (tokens, width), one after the other."""
    states = [prompt.expand(len(latents), -1, -1) for prompt in prompts]
    rows = scheduler.scale_model_input(latents, t).repeat(len(states), 1, 1, 1)
    times = t.float().expand(len(rows))
    return {"sample": rows, "timestep": times, "encoder_hidden_states": torch.cat(states)}
