"""Does contrast between attention maps keep two LoRAs apart in one picture, where their sum mixes them?

    python -m experiments.clora [--seeds 5] [--steps 300] [--smoke]

The tiny denoiser has two LoRAs of cross-attention, which paint what the prompt calls red yellow and magenta; a yellow
square and a magenta circle are to be shown. By CLoRA (``lorac.diffusion.clora``) each LoRA predicts the noise under a
prompt of its own, where only its own object is red, and is heard where its words are attended to; with updates, the
first ten of 20 steps move the latents so that maps of one object agree and those of both do not. Against it stands the
sum of both LoRAs under one prompt. Overlap is the intersection over union of both objects' maps, each cut at half of
its largest value, as a mean over all steps.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from unittest.mock import patch

from torch import Tensor

from experiments._compositions import measure, prepare
from experiments._denoising import tables
from experiments._finding import Expected, Finding
from experiments._study import Experiment, Fault, main
from lorac.diffusion.clora import contrast

SUM, STILL, MOVED = "the sum of both", "CLoRA, no updates", "CLoRA"
OVERLAP, SHOWN = "overlap", "both shown"


def find(given: argparse.Namespace) -> Finding:
    """Return what the pictures of each side show, and how much attention overlaps."""
    ways = prepare(given)
    sides = {SUM: ways.merged, STILL: functools.partial(ways.contrast, rate=0.0), MOVED: ways.contrast}
    found = measure(ways, sides, given)
    kept = {side: {name: own[name] for name in (OVERLAP, SHOWN)} for side, own in found.items()}
    return Finding(tables("of attention, or of pictures", kept), EXPECTED)


def attract(maps: Tensor, concepts: Sequence[int], temperature: float = 0.5) -> Tensor:
    """Return the contrast of maps that are all of one concept, so that none of them repels another."""
    return contrast(maps, [0] * len(concepts), temperature)


EXPECTED = [
    Expected(OVERLAP, MOVED, SUM, "section 4"),
    Expected(OVERLAP, MOVED, STILL, "section 4"),
    Expected(SHOWN, SUM, MOVED, "section 4"),
]
EXPERIMENT = Experiment(
    claim="Contrast between attention maps lowers the overlap of two LoRAs' objects, and both are shown, where the sum "
    "of the LoRAs mixes them.",
    source="Meral et al., CLoRA, arXiv 2403.19776, section 4",
    find=find,
    steps=300,
    fails_by="maps that overlap as before, or pictures that still show one object",
    fault=Fault("maps of two concepts do not repel", lambda: patch("lorac.diffusion.clora.contrast", attract)),
)

if __name__ == "__main__":
    main(EXPERIMENT, "clora", __doc__)
