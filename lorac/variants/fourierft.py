"""FourierFT and WaveFT: a few trained values of a transform of the update, at seeded positions.

Gao et al. 2024, arXiv 2405.03003; positions, initialisation and scale as in PEFT's FOURIERFT.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import numpy as np
import torch

from lorac.argument_types import Count, OneOf, Seed
from lorac.errors import SiteError
from lorac.variants.base import Params, ParamSpec, Role, Site, Tensor, WeightVariant
from lorac.variants.initialisers import normal


@dataclass(frozen=True, kw_only=True)
class TransformedVariant(WeightVariant):
    """A method that trains some values of the change's transform.

    Attributes:
        n_frequency: number of trained values per site.
        scaling: the scale of the change.
        random_loc_seed: seed of the positions, the first of torch.randperm(out·in); sites of one shape have the same
            positions.
        n_frequency_pattern: module pattern -> n_frequency of these modules.
    """

    n_frequency: Count
    scaling: float
    random_loc_seed: Seed = 777
    n_frequency_pattern: Mapping[str, int] = field(default_factory=dict)

    patterned: ClassVar[Mapping[str, str]] = {"n_frequency_pattern": "n_frequency"}
    spectrum: ClassVar[str]
    """Name of the trained values."""
    start_std: ClassVar[float]
    """Standard deviation of the trained values' start values."""

    def check(self, site: Site) -> None:
        super().check(site)
        size = site.out_features * site.in_features
        if self.n_frequency > size:
            raise SiteError(
                f"the spectrum of '{site.path}' has {size} values, and n_frequency is {self.n_frequency}",
                nearest=f"n_frequency={size}",
                next_step="give another n_frequency, or add the module to exclude=",
            )

    def params(self, site: Site) -> dict[str, ParamSpec]:
        shape = (site.out_features, site.in_features)
        return {
            "indices": ParamSpec((2, self.n_frequency), lambda c: self.positions(c.site), Role.INDEX, below=shape),
            self.spectrum: ParamSpec((self.n_frequency,), normal(self.start_std), decay=False),
        }

    def positions(self, site: Site) -> Tensor:
        """Return the positions (2, n_frequency) that the seed chooses: rows and columns."""
        generator = torch.Generator().manual_seed(self.random_loc_seed)
        flat = torch.randperm(site.out_features * site.in_features, generator=generator)[: self.n_frequency]
        return torch.stack((flat // site.in_features, flat % site.in_features))


@dataclass(frozen=True, kw_only=True)
class FourierFT(TransformedVariant):
    """``W' = W + scaling·Re(ifft2(S))``, where S (out, in) has n_frequency trained values and zeros elsewhere.

    The values start from N(0, 1), so that a fresh adapter changes the output strongly.

    Attributes:
        scaling: the scale; the inverse transform divides by out·in.
    """

    n_frequency: Count = 1000
    scaling: float = 150.0

    name = "fourierft"
    paper = "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform, arXiv 2405.03003"
    identity_at_init = False
    spectrum, start_std = "fourierft_spectrum", 1.0

    def weight(self, W: Tensor, p: Params) -> Tensor:
        rows, columns = p.indices
        spectrum = torch.index_put(torch.zeros_like(W), (rows, columns), p.fourierft_spectrum)
        return W + self.scaling * torch.fft.ifft2(spectrum).real


_OUTER_ZEROS = {"sym4": 2, "sym5": 1, "sym6": 5, "sym7": 1, "sym8": 10, "sym9": 6, "sym10": 21}
"""Symlet -> which of its zeros are outside the unit circle, one bit each from the smallest: its phase is nearly
linear."""
WAVELETS = (*(f"db{order}" for order in range(1, 11)), *(f"sym{order}" for order in range(2, 11)))


@functools.cache
def _lowpass(wavelet: str) -> tuple[float, ...]:
    """Return Daubechies' synthesis filter of 2N taps: N zeros at −1, and one zero of each pair z, 1/z of other zeros.

    The pairs are the zeros of Σₖ C(N−1+k, k)·yᵏ with y = (2 − z − 1/z)/4 (Daubechies 1992, section 6.1).
    """
    order = int(wavelet.lstrip("dbsym"))
    squared = np.roots([math.comb(order - 1 + k, k) for k in reversed(range(order))])
    upper = [(min(np.roots([1, 4 * y - 2, 1]), key=abs), y.imag) for y in squared if y.imag >= 0]
    taps = np.poly([-1.0] * order)
    for index, (inner, imaginary) in enumerate(sorted(upper, key=lambda pair: abs(pair[0]))):
        zero = 1 / inner if _OUTER_ZEROS.get(wavelet, 0) >> index & 1 else inner
        taps = np.convolve(taps, np.poly([zero, zero.conjugate()] if imaginary else [zero]).real)
    return tuple(taps * math.sqrt(2) / taps.sum())


@dataclass(frozen=True, kw_only=True)
class WaveFT(TransformedVariant):
    """``W' = W + scaling·idwt2(S)``, where S has n_frequency trained coefficients and zeros elsewhere.

    WaveFT: a few trained coefficients of the update's two-dimensional wavelet transform. Bilican et al. 2025, arXiv
    2505.12532; positions, padding and filters as in PEFT's WAVEFT.

    S has 2N − 2 more rows and columns than W, made even; the positions are in its middle. Its quarters are the bands of
    one step of the transform: means, details along columns, along rows, and along both. Convolved with the wavelet's
    filters of 2N taps they give the change (out, in).

    Attributes:
        wavelet_family: Daubechies' wavelet ``"db1"`` (Haar's) to ``"db10"``, or symlet ``"sym2"`` to ``"sym10"``.
        use_idwt: whether to apply the transform; else the trained values are entries of the change.
    """

    n_frequency: Count = 2592
    scaling: float = 25.0
    wavelet_family: Annotated[str, OneOf(WAVELETS)] = "db1"
    use_idwt: bool = True

    name = "waveft"
    paper = "Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets, arXiv 2505.12532"
    spectrum, start_std = "waveft_spectrum", 0.0

    def weight(self, W: Tensor, p: Params) -> Tensor:
        rows, columns = p.indices
        if not self.use_idwt:
            return torch.index_put(W, (rows, columns), self.scaling * p.waveft_spectrum, accumulate=True)
        low = torch.tensor(_lowpass(self.wavelet_family), dtype=W.dtype, device=W.device)
        high = low.flip(0) * (1 - 2 * (torch.arange(len(low), device=W.device) % 2))
        out, width = W.shape
        extra = len(low) - 2
        half, half_width = (out + extra + 1) // 2, (width + extra + 1) // 2
        places = rows + (2 * half - out) // 2, columns + (2 * half_width - width) // 2
        padded = torch.index_put(W.new_zeros(2 * half, 2 * half_width), places, p.waveft_spectrum)
        bands = padded.reshape(2, half, 2, half_width).transpose(1, 2).reshape(1, 4, half, half_width)
        pairs = ((low, low), (high, low), (low, high), (high, high))
        filters = torch.stack([torch.outer(*pair) for pair in pairs])[:, None]
        change = torch.nn.functional.conv_transpose2d(bands, filters, stride=2)[0, 0]
        return W + self.scaling * change[extra : extra + out, extra : extra + width]
