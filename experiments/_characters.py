"""Pictures of characters in the fonts that matplotlib brings, each turned, shifted, sized and blurred by chance."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

DIGITS = "0123456789"
FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Bold"),
    *("DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10"),
)
GRID, TURN, NOISE = 32, 15.0, 0.08


@functools.cache
def glyphs(characters: str) -> Tensor:
    """Return each character in each font, white on black: (fonts, characters, GRID, GRID)."""
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    drawn = torch.zeros(len(FONTS), len(characters), GRID, GRID)
    for row, font in enumerate(FONTS):
        letters = ImageFont.truetype(Path(get_data_path(), "fonts/ttf", f"{font}.ttf"), 26)
        for column, character in enumerate(characters):
            picture = Image.new("L", (GRID, GRID))
            ImageDraw.Draw(picture).text((GRID / 2, GRID / 2), character, fill=255, font=letters, anchor="mm")
            drawn[row, column] = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(GRID, GRID)
    return drawn / 255


def pictures(labels: Tensor, seed: int, *, characters: str = DIGITS, turn: float = 0.0, size: int = 8) -> Tensor:
    """Draw the characters of some labels, turned by ``turn`` degrees besides: (rows, size, size), about zero."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(labels)
    fonts = torch.randint(len(FONTS), (rows,), generator=generator)
    angles = torch.deg2rad(turn + TURN * (2 * torch.rand(rows, generator=generator) - 1))
    zoom = 0.8 + 0.4 * torch.rand(rows, generator=generator)
    shifts = 0.2 * (2 * torch.rand(rows, 2, generator=generator) - 1)
    turned = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], 1).view(rows, 2, 2)
    places = torch.cat([turned / zoom[:, None, None], shifts[:, :, None]], 2)
    grid = F.affine_grid(places, [rows, 1, 2 * size, 2 * size], align_corners=False)
    drawn = F.grid_sample(glyphs(characters)[fonts, labels][:, None], grid, align_corners=False)
    small = F.avg_pool2d(drawn, 2)[:, 0]
    return 2 * (small + NOISE * torch.randn(small.shape, generator=generator)) - 0.5
