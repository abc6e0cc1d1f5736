"""The pictures of DECOR and HiPA in docs/diffusion.md.

    python -m docs.draw_styles

They come from the parts of ``experiments.decor`` and ``experiments.hipa``, whose networks are trained first where they
are not in the cache.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

import lorac
from examples import denoiser
from experiments import hipa
from experiments._denoising import sample
from lorac.diffusion import decor
from lorac.diffusion.high_frequencies import radial_spectrum
from lorac.diffusion.hipa import OneStep, make_target, train_one_step

FOLDER = Path(__file__).parent / "pictures"
CELL, MARGIN, COUNT, LABEL = 80, 4, 8, 150
COLOURS = ("black", "firebrick", "royalblue", "seagreen")
WIDE, HIGH, EDGE = 640, 300, 40


def draw_sheet(rows: dict[str, Tensor]) -> Image.Image:
    """A sheet with a labelled row of pictures (n, 3, 16, 16) for each side."""
    step = CELL + MARGIN
    sheet = Image.new("RGB", (LABEL + step * COUNT, step * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (label, pictures) in enumerate(rows.items()):
        pen.text((4, row * step + CELL // 2 - 5), label, fill="black")
        for column, picture in enumerate(pictures[:COUNT]):
            values = ((picture.clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).numpy()
            image = Image.fromarray(values).resize((CELL, CELL), Image.Resampling.NEAREST)
            sheet.paste(image, (LABEL + column * step, row * step))
    return sheet


def draw_spectra(rows: dict[str, Tensor]) -> Image.Image:
    """Lines of log₁₀ power by frequency, from 0 to the highest."""
    sheet = Image.new("RGB", (WIDE, HIGH), "white")
    pen = ImageDraw.Draw(sheet)
    lines = {label: radial_spectrum(pictures, 8).log10() for label, pictures in rows.items()}
    low, high = (torch.stack(list(lines.values())).aminmax()[n].item() for n in (0, 1))
    pen.rectangle((EDGE, EDGE // 2, WIDE - EDGE, HIGH - EDGE), outline="lightgrey")
    width, height = WIDE - 2 * EDGE, HIGH - 1.5 * EDGE
    for place, (label, line) in enumerate(lines.items()):
        shares = [(high - float(value)) / (high - low) for value in line]
        ends = [(EDGE + (n + 0.5) / 8 * width, EDGE // 2 + share * height) for n, share in enumerate(shares)]
        pen.line(ends, fill=COLOURS[place], width=2)
        pen.text((WIDE - 4 * EDGE, EDGE + 16 * place), label, fill=COLOURS[place])
    axes = f"frequency, from 0 to the highest; log10 of power, from {low:.1f} to {high:.1f}"
    pen.text((EDGE, HIGH - EDGE + 8), axes, fill="black")
    return sheet


def draw_decor() -> Image.Image:
    """Pictures of one prompt under a growing share of the unwanted words' span."""
    parts, wanted, unwanted = denoiser.load(), ("red", "square"), ("blue", "circle")
    states = parts.states(denoiser.make_prompt((wanted, unwanted)))
    span = decor.unwanted_span(parts.states(denoiser.make_prompt([unwanted]))[0, 1:3])
    every = torch.ones(denoiser.TOKENS)
    rows = {}
    for alpha in (0.0, 0.5, 0.75, 1.0):
        told = decor.project(states, span, alpha, rows=every)
        rows[f"DECOR, alpha {alpha}"] = sample(parts.unet, told, denoiser.noise(COUNT, 3), 20)
    return draw_sheet(rows)


def draw_hipa() -> tuple[Image.Image, Image.Image]:
    """Pictures of one noise in one step and in many, and their spectra."""
    parts = hipa.load_base()
    step = OneStep.of(parts.unet, denoiser.make_scheduler()).eval()

    def given(seed: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        noise, states = denoiser.noise(count, seed), parts.states(*hipa.PROMPTS).repeat(count // 2, 1, 1)
        made = make_target(parts.unet, denoiser.make_scheduler(), noise, states, steps=20)
        return noise, states, denoiser.to_images(made)

    known, (held, told, wanted) = given(1, 256), given(999, 64)
    rows = {"base, 20 steps": wanted}
    with torch.no_grad():
        rows["base, one step"] = denoiser.to_images(step(held, told))
    for label, side in (("one step, L1", "L1"), ("one step, HiPA", "D + both")):
        compiled = lorac.compile(step, {"hipa": lorac.LoRA(r=16, alpha=16, targets=hipa.TARGETS)})
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randint(0, 256, (hipa.ROWS,), generator=generator) for _ in range(60)]
        batches = [(known[0][at], known[1][at], known[2][at]) for at in drawn]
        train_one_step(compiled, batches, loss=hipa.SIDES[side], rate=3e-3, to_images=denoiser.to_images)
        with torch.no_grad():
            rows[label] = denoiser.to_images(compiled(held, told))
    return draw_sheet(rows), draw_spectra(rows)


def main() -> None:
    """Draw all sheets."""
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    draw_decor().save(FOLDER / "decor.png", optimize=True)
    sheet, spectra = draw_hipa()
    sheet.save(FOLDER / "hipa.png", optimize=True)
    spectra.save(FOLDER / "spectra.png", optimize=True)


if __name__ == "__main__":
    main()
