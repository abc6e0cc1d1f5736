"""Does DECOR keep an unwanted object out of a picture, and the wanted one in it, beside a LoRA too?

    python -m experiments.decor [--seeds 5] [--steps 150] [--smoke]

Asked for "a red square and a blue circle" the tiny denoiser draws both. The second one is the unwanted content: its
words' embeddings, encoded alone, span what is projected out of the whole prompt, more of it as α grows. A LoRA that
learned to draw the square yellow, from pictures with and without the blue circle, draws that as the base does; the
projection is chained after the LoRA in cross-attention, against a sum of the two. Leakage is the share of pictures that
show the unwanted object, and of those that show a quarter of it or more in its colour, of whatever shape; alignment is
the share that show the wanted one, and is compared with that of the LoRA alone, whose own training sets how often it
draws what it learned. A seed is another pair of objects and other noise.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F

import lorac
from examples import denoiser
from experiments._denoising import load, sample, share, tables
from experiments._finding import Expected, Finding, Table
from experiments._study import Experiment, Fault, deciding, main
from lorac.diffusion import decor
from lorac.progress import progress

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
PAIRS = (
    (("red", "square"), ("blue", "circle")),
    (("green", "circle"), ("red", "square")),
    (("blue", "square"), ("green", "circle")),
    (("red", "circle"), ("green", "square")),
    (("green", "square"), ("red", "circle")),
)
"""The wanted and the unwanted object; a word in both would be projected out of the wanted one too."""
ROWS, PICTURES = 16, 32
KEPT = "alignment that is kept"


def repainted(parts: denoiser.Denoiser, pair: Any, seed: int, steps: int) -> lorac.Adapter:
    """Return a LoRA that draws the first object of a pair yellow, taught by pictures of both and of it alone."""
    generator = torch.Generator().manual_seed(seed)
    shown, told = [], (denoiser.make_prompt(pair), denoiser.make_prompt(pair[:1]))
    for index in range(64):
        image, masks = denoiser.draw(pair[: 2 - index % 2], generator)
        image[:, masks[0]] = torch.tensor(denoiser.COLOURS["yellow"], dtype=image.dtype)[:, None]
        shown.append(image)
    latents, states = denoiser.to_latents(torch.stack(shown)), parts.states(*told).repeat(32, 1, 1)
    method = lorac.LoRA(r=4, alpha=4, targets=("attn2.to_k", "attn2.to_v"))
    compiled: Any = lorac.compile(parts.unet, {f"yellow{seed}": method})
    optimizer = torch.optim.AdamW([p for p in compiled.parameters() if p.requires_grad], lr=2e-2)
    scheduler = denoiser.make_scheduler()
    for _ in range(steps):
        at = torch.randint(0, len(latents), (ROWS,), generator=generator)
        x = latents[at]
        t = torch.randint(0, 1000, (ROWS,), generator=generator)
        noise = torch.randn(x.shape, generator=generator)
        found = compiled(scheduler.add_noise(x, noise, t), t, states[at]).sample
        optimizer.zero_grad()
        F.mse_loss(found, scheduler.get_velocity(x, noise, t)).backward()
        optimizer.step()
    return compiled.adapters[f"yellow{seed}"]


def shows_colour(images: torch.Tensor, colour: str, pixels: int = 9) -> float:
    """Return the share of pictures with some pixels of a colour."""
    near = (images - torch.tensor(denoiser.COLOURS[colour])[:, None, None]).abs().amax(1) < 1
    return float((near.sum((1, 2)) >= pixels).float().mean())


def find(given: argparse.Namespace) -> Finding:
    """Return the shares of pictures with leakage and with what was asked for."""
    parts = load(given)
    count, many = (2, 2) if given.steps <= 2 else (PICTURES, 10)
    figures: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with progress("experiment", total=given.seeds) as report:
        for seed in deciding(given):
            report.step(f"seed {seed}")
            pair = PAIRS[seed % len(PAIRS)]
            (wanted, unwanted), latents = pair, denoiser.noise(count, seed)
            states = parts.states(denoiser.make_prompt(pair))
            alone = parts.states(denoiser.make_prompt([unwanted]))[0, 1:3]
            span, rows = decor.unwanted_span(alone), torch.ones(denoiser.TOKENS)
            lora = repainted(parts, pair, seed, given.steps)

            def note(side: str, unet: Any, told: Any, drawn: Any, noted: Any = (latents, unwanted)) -> None:
                images = sample(unet, told, noted[0], many)
                figures[side]["leaked object"].append(share(images, *noted[1]))
                figures[side]["leaked colour"].append(shows_colour(images, noted[1][0]))
                figures[side]["alignment"].append(share(images, *drawn))

            for alpha in ALPHAS:
                note(f"base, α = {alpha}", parts.unet, decor.project(states, span, alpha, rows=rows), wanted)
            yellow = ("yellow", wanted[1])
            for alpha in ALPHAS:
                chained = decor.chain_after(lora, span, parts.unet, alpha, name="chain")
                note(f"LoRA, α = {alpha}", lorac.compile(parts.unet, {"chain": chained}), states, yellow)
            summed: Any = lorac.compile(parts.unet, {"lora": lora, "decor": decor.at_cross_attention(parts.unet, span)})
            summed.swap({"lora": 1.0, "decor": 1.0})
            note("LoRA, a sum", summed, states, yellow)
    unprojected = figures["LoRA, α = 0.0"]["alignment"]
    kept = {
        side: [one / max(own, 1 / count) for one, own in zip(found["alignment"], unprojected, strict=True)]
        for side, found in figures.items()
        if side.startswith("LoRA")
    }
    compared = Table(KEPT, "as a share of the LoRA's alone", kept)
    return Finding([*tables("share of pictures", figures), compared], EXPECTED)


def leave(states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Return the states of a prompt as they are."""
    return states


EXPECTED = [
    Expected("leaked object", "base, α = 1.0", "base, α = 0.0", "sections 3 and 4"),
    Expected("leaked object", "LoRA, α = 1.0", "LoRA, α = 0.0", "sections 3 and 4"),
    Expected("leaked colour", "LoRA, α = 1.0", "LoRA, a sum"),
    Expected(KEPT, 0.8, "LoRA, α = 1.0"),
]
EXPERIMENT = Experiment(
    claim="Projecting the span of unwanted words out of the prompt's embeddings keeps their object out of the picture, "
    "and the wanted one in it, beside a LoRA too.",
    source="Jang et al., DECOR, arXiv 2412.09169, sections 3 and 4",
    find=find,
    steps=150,
    first=100,
    fails_by="words whose span holds the wanted object too, or a LoRA that draws the unwanted one under any prompt",
    fault=Fault("the prompt is left as it is", lambda: patch("lorac.diffusion.decor.project", leave)),
)

if __name__ == "__main__":
    main(EXPERIMENT, "decor", __doc__)
