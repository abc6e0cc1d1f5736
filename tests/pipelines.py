"""Toy pipelines in tests: their pictures, and the layers that tests adapt."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from examples.pipelines import TOKENS

TARGETS = ("to_q", "to_v", "conv1", "q_proj", "fc1", "add_q_proj")
"""Layers of denoisers and of CLIP."""


def paint(
    made: Any, prompt: str | list[str] = "a cat", steps: int = 3, seeds: Any = (0,), **options: Any
) -> np.ndarray:
    """Return images of a pipeline, (rows, height, width, 3) from 0 to 1; ``seeds`` is one for all, or one per image."""
    kinds = {kind.__name__ for kind in type(made).__mro__}
    if kinds & {"FluxPipeline", "StableDiffusion3Pipeline"}:
        options = {"max_sequence_length": TOKENS, **options}
    options = {"height": 32, "width": 24, **options}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    drawn = generators[0] if len(generators) == 1 else generators
    with warnings.catch_warnings():  # diffusers' Euler scheduler gives NumPy a tensor, in an expression of its own
        warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy keyword", DeprecationWarning)
        return made(prompt, num_inference_steps=steps, output_type="np", generator=drawn, **options).images
