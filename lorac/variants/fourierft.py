"""FourierFT: a few trained frequencies of the update's two-dimensional spectrum.

Gao et al. 2024, arXiv 2405.03003; positions, initialisation and scale as in PEFT's FOURIERFT.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from lorac.argument_types import Count, Seed
from lorac.errors import SiteError
from lorac.variants.base import Params, ParamSpec, Role, Site, Tensor, WeightVariant
from lorac.variants.initialisers import normal


@dataclass(frozen=True, kw_only=True)
class FourierFT(WeightVariant):
    """``W' = W + scaling·Re(ifft2(S))``, S (out, in) holding n_frequency trained values and zeros elsewhere.

    The values start from N(0, 1), so a fresh adapter changes the output strongly.

    Attributes:
        n_frequency: number of trained values per site.
        scaling: the scale; the inverse transform divides by out·in.
        random_loc_seed: chooses the positions, the same on all sites of a shape: the first of torch.randperm(out·in).
        n_frequency_pattern: module pattern -> its own n_frequency.
    """

    n_frequency: Count = 1000
    scaling: float = 150.0
    random_loc_seed: Seed = 777
    n_frequency_pattern: Mapping[str, int] = field(default_factory=dict)

    name = "fourierft"
    paper = "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform, arXiv 2405.03003"
    identity_at_init = False
    patterned: ClassVar[Mapping[str, str]] = {"n_frequency_pattern": "n_frequency"}

    def check(self, site: Site) -> None:
        super().check(site)
        size = site.out_features * site.in_features
        if self.n_frequency > size:
            raise SiteError(
                f"the spectrum of '{site.path}' has {size} values, and n_frequency is {self.n_frequency}",
                nearest=f"n_frequency={size}",
                next_step="give another n_frequency, or exclude= the module",
            )

    def params(self, site: Site) -> dict[str, ParamSpec]:
        shape = (site.out_features, site.in_features)
        return {
            "indices": ParamSpec((2, self.n_frequency), lambda c: self.positions(c.site), Role.INDEX, below=shape),
            "fourierft_spectrum": ParamSpec((self.n_frequency,), normal(1.0), decay=False),
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        rows, columns = p.indices
        spectrum = torch.index_put(torch.zeros_like(W), (rows, columns), p.fourierft_spectrum)
        return W + self.scaling * torch.fft.ifft2(spectrum).real

    def positions(self, site: Site) -> Tensor:
        """Return the positions (2, n_frequency) that the seed chooses: rows and columns."""
        generator = torch.Generator().manual_seed(self.random_loc_seed)
        flat = torch.randperm(site.out_features * site.in_features, generator=generator)[: self.n_frequency]
        return torch.stack((flat // site.in_features, flat % site.in_features))
