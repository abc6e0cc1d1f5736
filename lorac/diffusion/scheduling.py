"""The calls of a U-Net that compositions make: their prompts, and the methods of diffusers' schedulers they use."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from lorac.errors import ExampleInputsNeeded, InputMismatch
from lorac.frontend.host import Host

_ADDED = "added_cond_kwargs"
"""The argument of U-Nets that holds conditions by name, next to the prompt's states."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """The embeddings of a prompt, for a U-Net that takes more than its tokens' states.

    Attributes:
        states: of its tokens (tokens, width).
        added: the U-Net's ``added_cond_kwargs``, without the axis of rows: for SDXL ``text_embeds`` (width,), the
            pooled embedding, and ``time_ids`` (6,), the original height and width, top and left of the crop, and the
            height and width that are wanted, in pixels.
    """

    states: Tensor
    added: Mapping[str, Tensor] = field(default_factory=dict)


Embeddings = Tensor | Prompt
"""A prompt: the states of its tokens (tokens, width), or these with the U-Net's other inputs."""


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
        """Return the latents before a step, from the model's prediction."""


def find_conditions(unet: nn.Module) -> frozenset[str] | None:
    """Return the names of ``added_cond_kwargs`` that a U-Net needs; None where its configuration does not say."""
    try:
        added = Host.of(unet).example_inputs().get(_ADDED)
    except ExampleInputsNeeded:
        added = None
    if isinstance(added, Mapping):
        return frozenset(added)
    return None if getattr(getattr(unet, "config", None), "addition_embed_type", None) else frozenset()


def call_rows(
    scheduler: NoiseScheduler,
    latents: Tensor,
    t: Tensor,
    prompts: Sequence[Embeddings],
    conditions: frozenset[str] | None = None,
) -> dict[str, object]:
    """Return a U-Net's arguments for latents (b, …) under each of some prompts, one after the other.

    Args:
        scheduler: of diffusers.
        latents: of each row.
        t: the time.
        prompts: one after the other, for all latents.
        conditions: as ``find_conditions`` returns them; None: those of the first prompt.

    Raises:
        InputMismatch: a prompt has other conditions.
    """
    given = [one if isinstance(one, Prompt) else Prompt(one) for one in prompts]
    wanted = frozenset(given[0].added) if conditions is None else conditions
    for prompt in given:
        if prompt.added.keys() != wanted:
            raise InputMismatch(
                f"for each prompt the U-Net takes its states and {', '.join(sorted(wanted)) or 'nothing else'}, and "
                f"one has {', '.join(sorted(prompt.added)) or 'states alone'}",
                next_step="give every prompt as lorac.diffusion.scheduling.Prompt(states, added={name: tensor})",
            )
    rows = scheduler.scale_model_input(latents, t).repeat(len(given), 1, 1, 1)
    added = {name: torch.cat([one.added[name].expand(len(latents), -1) for one in given]) for name in given[0].added}
    return {
        "sample": rows,
        "timestep": t.float().expand(len(rows)),
        "encoder_hidden_states": torch.cat([one.states.expand(len(latents), -1, -1) for one in given]),
        **({_ADDED: added} if added else {}),
    }
