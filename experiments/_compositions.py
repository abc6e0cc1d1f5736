"""Parts that experiments with two LoRAs in one picture of the tiny denoiser share."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Mapping

from torch import Tensor

from examples import compositions, denoiser
from experiments._denoising import load
from lorac.progress import progress

Figures = dict[str, dict[str, list[float]]]
"""Side -> figure -> its value of each seed."""


def prepare(given: argparse.Namespace) -> compositions.Compositions:
    """Return the ways to have a yellow square and a magenta circle in one picture, by a LoRA for each colour."""
    base, colours = load(given), compositions.CONCEPTS
    loras = {c: compositions.learn_concept(base, c, steps=given.steps, seed=n) for n, c in enumerate(colours)}
    return compositions.Compositions(base, loras)


def measure(
    ways: compositions.Compositions, sides: Mapping[str, Callable[[Tensor], Tensor]], given: argparse.Namespace
) -> Figures:
    """Return the figures of sides, each from noise to pictures; a seed is 16 pictures."""
    count = 2 if given.steps <= 2 else compositions.PICTURES
    found: Figures = {side: defaultdict(list) for side in sides}
    with progress("experiment", total=given.seeds * len(sides)) as report:
        for seed, side in ((seed, side) for seed in range(given.seeds) for side in sides):
            report.step(f"{side}, seed {seed}")
            ways.seen = []
            for figure, value in ways.figures(sides[side](denoiser.noise(count, seed))).items():
                found[side][figure].append(value)
    return found
