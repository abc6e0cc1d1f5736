"""Parts that experiments on the tiny denoiser share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from examples import denoiser
from experiments._finding import Table


def load(given: argparse.Namespace) -> denoiser.Denoiser:
    """Return the trained denoiser; for a smoke run one that has hardly begun to learn."""
    torch.set_num_threads(1)
    return denoiser.train(2, 2, pictures=8, rows=2) if given.steps <= 2 else denoiser.load()


@torch.no_grad()
def sample(unet: Callable[..., Any], states: Tensor, latents: Tensor, steps: int = 20) -> Tensor:
    """Return the pictures that latents become under states of prompts, one each or one for all, without guidance."""
    scheduler, states = denoiser.make_scheduler(steps), states.expand(len(latents), -1, -1)
    for t in scheduler.timesteps:
        latents = scheduler.step(unet(latents, t, states).sample, t, latents).prev_sample
    return denoiser.to_images(latents)


def share(images: Tensor, colour: str, shape: str) -> float:
    """Return the share of pictures that show a shape in a colour."""
    return sum(denoiser.contains(image, colour, shape) for image in images) / len(images)


def tables(title: str, figures: Mapping[str, Mapping[str, Sequence[float]]]) -> list[Table]:
    """Return a table for each figure: side -> figure -> its values over seeds."""
    names = next(iter(figures.values()))
    return [Table(name, title, {side: own[name] for side, own in figures.items()}) for name in names]
