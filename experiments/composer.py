"""Do regions with a LoRA each show both concepts in their boxes, where the sum of both LoRAs shows neither?

    python -m experiments.composer [--seeds 5] [--steps 300] [--smoke]

The tiny denoiser has two LoRAs of cross-attention, which paint what the prompt calls red yellow and magenta. A yellow
square is to be on the left and a magenta circle on the right. Each LoRA and its own prompt, "a red square" and "a red
circle", is given a box (``lorac.diffusion.composer``), with and without updates of the latents in the first ten of 20
steps; against them stands the sum of both LoRAs under one prompt. The share of the attention to a concept's words that
lies in its box is a mean over all steps; a box is a quarter of the picture. Self-attention from one box to the other is
measured at the pictures' end, with and without isolation.
"""

from __future__ import annotations

import argparse
import functools
from unittest.mock import patch

import torch
from torch import Tensor

from examples import compositions, denoiser
from experiments._compositions import measure, prepare
from experiments._denoising import tables
from experiments._finding import Expected, Finding, Table
from experiments._study import Experiment, Fault, main
from lorac.diffusion.attention import rasterise, select_maps
from lorac.diffusion.composer import LEAKS

SUM, STILL, MOVED = "the sum of both", "regions, no updates", "regions"
SHARE, BOTH, CROSSING, FREE = "share in box", "both in their boxes", "from box to box", "not isolated"


@torch.no_grad()
def crossing(ways: compositions.Compositions, latents: Tensor, *, isolated: bool) -> float:
    """Return the mean self-attention of pixels in one box to those in the other."""
    composer = ways.composed
    composer.place(ways.places if isolated else [])
    composer.engine(latents, torch.tensor(500), ways.states.expand(len(latents), -1, -1))
    grid = latents.shape[-2], latents.shape[-1]
    maps = torch.stack(select_maps(composer.engine.aux[LEAKS], grid)).mean((0, 1))
    one, two = rasterise(torch.tensor(list(compositions.BOXES.values())), *grid).flatten(1)
    return float(maps[one][:, two].sum(1).mean() + maps[two][:, one].sum(1).mean()) / 2


def find(given: argparse.Namespace) -> Finding:
    """Return what the pictures of each side show, and where attention lies."""
    ways = prepare(given)
    leaks: dict[str, list[float]] = {MOVED: [], FREE: []}

    def moved(noise: Tensor) -> Tensor:
        images = ways.regions(noise)
        for side, isolated in ((FREE, False), (MOVED, True)):
            leaks[side].append(crossing(ways, denoiser.to_latents(images), isolated=isolated))
        return images

    sides = {SUM: ways.merged, STILL: functools.partial(ways.regions, rate=0.0), MOVED: moved}
    found = tables("of pictures, or of attention", measure(ways, sides, given))
    return Finding([*found, Table(CROSSING, "share of the self-attention in a box", leaks)], EXPECTED)


EXPECTED = [
    Expected(BOTH, SUM, MOVED, "section 3"),
    Expected(BOTH, SUM, 0.05),
    Expected(SHARE, SUM, MOVED, "section 3"),
    Expected(SHARE, STILL, MOVED, "section 3"),
    Expected(SHARE, 0.5, MOVED),
    Expected(CROSSING, MOVED, 1e-6),
    Expected(CROSSING, MOVED, FREE, "section 3"),
]
EXPERIMENT = Experiment(
    claim="LoRAs with a box each show both concepts there, where the sum of the LoRAs shows neither; updates of the "
    "latents draw attention into the boxes, and self-attention does not cross them.",
    source="Yang et al., LoRA-Composer, arXiv 2403.11627, section 3",
    find=find,
    steps=300,
    fails_by="attention that stays out of its box or crosses into another, or pictures without both objects",
    fault=Fault("the latents are not updated", lambda: patch("lorac.diffusion.composer.update_rate", return_value=0.0)),
)

if __name__ == "__main__":
    main(EXPERIMENT, "composer", __doc__)
