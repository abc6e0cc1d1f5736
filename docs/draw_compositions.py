"""The pictures of docs/diffusion.md: what the ways of composing two LoRAs paint from the same noise.

    python -m docs.draw_compositions

They come from ``examples.compositions``; the denoiser is trained first if it is not in the cache.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from examples import denoiser
from examples.compositions import BOXES, CONCEPTS, Compositions, learn_concept

FOLDER = Path(__file__).parent / "pictures"
CELL, MARGIN, COUNT, SEED = 80, 4, 8, 0
LABEL = 150


def as_image(picture: Tensor) -> Image.Image:
    """A picture (3, height, width) from -1 to 1, enlarged."""
    values = ((picture.clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).numpy()
    return Image.fromarray(values).resize((CELL, CELL), Image.Resampling.NEAREST)


def as_heat(values: Tensor) -> Image.Image:
    """A map (height, width), its largest value white."""
    return as_image((values / values.max() * 2 - 1).expand(3, -1, -1))


def draw_rows(rows: dict[str, list[Image.Image]], boxed: set[str]) -> Image.Image:
    """A sheet with a labelled row of pictures for each way; ``boxed`` rows show the boxes."""
    step = CELL + MARGIN
    sheet = Image.new("RGB", (LABEL + step * max(map(len, rows.values())), step * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for r, (label, images) in enumerate(rows.items()):
        pen.text((4, r * step + CELL // 2 - 5), label, fill="black")
        for c, image in enumerate(images):
            corner = (LABEL + c * step, r * step)
            sheet.paste(image, corner)
            for top, left, bottom, right in BOXES.values() if label in boxed else ():
                ends = [corner[n % 2] + round(CELL * at) for n, at in enumerate((left, top, right, bottom))]
                pen.rectangle(tuple(ends), outline="white")
    return sheet


def main() -> None:
    """Draw both sheets."""
    torch.set_num_threads(1)
    base, noise = denoiser.load(), denoiser.noise(COUNT, SEED)
    ways = Compositions(base, {c: learn_concept(base, c, seed=n) for n, c in enumerate(CONCEPTS)})
    runs = {"the denoiser": ways.plain, "merged LoRAs": ways.merged, "regions": ways.regions, "CLoRA": ways.contrast}
    rows, heats = {}, {}
    for label, run in runs.items():
        ways.maps = []
        rows[label] = [as_image(picture) for picture in run(noise)]
        if ways.maps:
            middle = ways.maps[len(ways.maps) // 2]
            heats[label] = [as_heat(middle[n][picture]) for picture in range(COUNT // 2) for n in range(len(CONCEPTS))]
    FOLDER.mkdir(exist_ok=True)
    draw_rows(rows, {"regions"}).save(FOLDER / "compositions.png", optimize=True)
    draw_rows(heats, {"regions"}).save(FOLDER / "attention.png", optimize=True)


if __name__ == "__main__":
    main()
