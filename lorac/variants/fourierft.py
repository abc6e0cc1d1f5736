"""FourierFT: a few trained frequencies of the two-dimensional spectrum of the update.

Gao et al. 2024, arXiv 2405.03003; positions, initialisation and scale as in PEFT's FOURIERFT.
"""

from dataclasses import dataclass

import torch

from lorac.argument_types import Count
from lorac.variants._transformed import TransformedVariant
from lorac.variants.base import Params, Tensor


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
