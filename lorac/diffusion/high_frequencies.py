"""High frequencies of images: their filters, the losses that compare them, and the spectra that show them.

HiPA (arXiv 2311.18158) compares an image and its target in space, by their high Fourier components and by their edges.
No code of it is public; these operators are put together from later work that names the same terms: the edges of
GarDiff, the Fourier part and its cut-off of PromptFix. In space the default is L1 at several scales and structural
similarity. DISTS, which the related work uses, needs weights that no package holds: give it as ``spatial`` where you
have it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lorac.argument_types import OneOf, check_fields

CUTOFF = 60 / 512
"""The lowest high frequency, as a share of the highest one: a radius of 30 at 512 pixels."""
_LUMA = (0.299, 0.587, 0.114)
_SCALES, _WINDOW = 3, 7
_FLOOR = 1e-8
Distance = Callable[[Tensor, Tensor], Tensor]
"""Images and their targets (b, c, h, w) -> a number."""


def radial_frequency(height: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Return the distance from frequency 0 (h, w) in ``torch.fft.fft2``'s order; 1 is the highest along an axis."""
    rows, columns = (torch.fft.fftfreq(size, d=0.5, device=device) for size in (height, width))
    return torch.hypot(rows[:, None], columns)


def high_pass(images: Tensor, cutoff: float = CUTOFF) -> Tensor:
    """Return images (…, h, w) without their frequencies up to a cut-off."""
    kept = radial_frequency(*images.shape[-2:], device=images.device) > cutoff
    return torch.fft.ifft2(torch.fft.fft2(images) * kept).real


def luma(images: Tensor) -> Tensor:
    """Return the brightness (…, 1, h, w) of RGB images (…, 3, h, w); other channels stay as they are."""
    if images.shape[-3] != len(_LUMA):
        return images
    return (images * images.new_tensor(_LUMA)[:, None, None]).sum(-3, keepdim=True)


def edges(images: Tensor) -> Tensor:
    """Return √(gx² + gy² + 1e-8) (b, c, h, w) of the brightness, gx and gy by Sobel's kernels; borders are repeated."""
    grey = luma(images)
    side = grey.new_tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    kernels = torch.stack([side, side.mT])[:, None]
    around = F.pad(grey, (1, 1, 1, 1), mode="replicate").flatten(0, 1)[:, None]
    slopes = F.conv2d(around, kernels).square().sum(1)
    return (slopes + _FLOOR).sqrt().reshape(grey.shape)


def structural_similarity(images: Tensor, targets: Tensor, *, span: float = 2.0) -> Tensor:
    """Return the mean structural similarity, from −1 to 1, in windows of 7 x 7 pixels or the whole of smaller images.

    Args:
        images, targets: (b, c, h, w).
        span: the largest value less the smallest that a pixel may have.
    """
    size = min(_WINDOW, *images.shape[-2:])

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(values, size, stride=1)

    x, y = mean(images), mean(targets)
    spread_x, spread_y = mean(images.square()) - x.square(), mean(targets.square()) - y.square()
    joint = mean(images * targets) - x * y
    a, b = (0.01 * span) ** 2, (0.03 * span) ** 2
    return ((2 * x * y + a) * (2 * joint + b) / ((x.square() + y.square() + a) * (spread_x + spread_y + b))).mean()


def structural_distance(images: Tensor, targets: Tensor) -> Tensor:
    """Return L1, averaged over up to three halvings of the size, plus 1 − structural similarity."""
    total, scales = 1 - structural_similarity(images, targets), 0
    distance = images.new_zeros(())
    while scales < _SCALES and min(images.shape[-2:]) > 1:
        distance, scales = distance + F.l1_loss(images, targets), scales + 1
        images, targets = F.avg_pool2d(images, 2), F.avg_pool2d(targets, 2)
    return total + distance / max(scales, 1)


@dataclass(frozen=True, kw_only=True)
class HighFrequencyLoss:
    """``D(x, x*) + λ·(D'(F·x, F·x*) + D'(S·x, S·x*))``: HiPA's two-part loss, F a high-pass filter, S edges.

    Attributes:
        high: which of the two high-frequency parts count: ``"both"``, ``"fourier"``, ``"edge"`` or ``"none"``.
        weight: λ.
        cutoff: of F, as a share of the highest frequency.
        by_maximum: as PromptFix has it: magnitudes, divided by each image's largest. It makes the parts blind to
            contrast.
        spatial: D, such as DISTS.
        between: D' of the high-frequency parts. L1 punishes misplaced detail, and so removes detail that noise does not
            determine; ``structural_distance`` does not.
    """

    high: Annotated[str, OneOf(("both", "fourier", "edge", "none"))] = "both"
    weight: float = 1.0
    cutoff: float = CUTOFF
    by_maximum: bool = False
    spatial: Distance = structural_distance
    between: Distance = F.l1_loss

    def __post_init__(self) -> None:
        check_fields(self)

    def parts(self, images: Tensor, targets: Tensor) -> dict[Literal["spatial", "fourier", "edge"], Tensor]:
        """Return the parts that count, without λ."""
        found: dict[Literal["spatial", "fourier", "edge"], Tensor] = {"spatial": self.spatial(images, targets)}
        if self.high in {"both", "fourier"}:
            found["fourier"] = self._distance(self._high_pass(images), self._high_pass(targets))
        if self.high in {"both", "edge"}:
            found["edge"] = self._distance(edges(images), edges(targets))
        return found

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of images (b, c, h, w) against their targets."""
        parts = self.parts(images, targets)
        return sum((self.weight * part for name, part in parts.items() if name != "spatial"), parts["spatial"])

    def _high_pass(self, images: Tensor) -> Tensor:
        found = high_pass(luma(images) if self.by_maximum else images, self.cutoff)
        return found.abs() if self.by_maximum else found

    def _distance(self, maps: Tensor, targets: Tensor) -> Tensor:
        if self.by_maximum:
            maps, targets = (
                found / found.amax((-3, -2, -1), keepdim=True).clamp(min=_FLOOR) for found in (maps, targets)
            )
        return self.between(maps, targets)


def radial_spectrum(images: Tensor, bands: int = 8) -> Tensor:
    """Return the mean power (bands,) of the brightness of images (b, c, h, w) in rings of equal width up to 1.

    Frequencies above 1, in the corners, belong to the last ring.
    """
    height, width = images.shape[-2:]
    power = torch.fft.fft2(luma(images)).abs().square().mean((0, 1)) / (height * width)
    ring = (radial_frequency(height, width, device=images.device) * bands).long().clamp(max=bands - 1)
    sums = torch.zeros(bands, dtype=power.dtype, device=power.device).index_add(0, ring.flatten(), power.flatten())
    return sums / ring.flatten().bincount(minlength=bands).clamp(min=1)


def closed_gap(found: Tensor, base: Tensor, target: Tensor, *, bands: int = 4) -> float:
    """Return the share of the power missing in the top ring that an adapter adds: 0 like the base, 1 like the target.

    Args:
        found, base, target: images (b, c, h, w) of the adapter, of the base in one step and of the base in many.
        bands: number of rings.
    """
    top, low, high = (float(radial_spectrum(images, bands)[-1]) for images in (found, base, target))
    return (top - low) / (high - low)
