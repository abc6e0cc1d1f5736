"""WaveFT: a few trained coefficients of the update's two-dimensional wavelet transform.

Bilican et al. 2025, arXiv 2505.12532; positions, padding and filters as in PEFT's WAVEFT.
"""

import functools
import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch

from lorac.argument_types import Count, OneOf
from lorac.variants._transformed import TransformedVariant
from lorac.variants.base import Params, Tensor

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
