"""Trained values at seeded positions of a matrix; a transform of the matrix is the change of the weight."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from lorac.argument_types import Count, Seed
from lorac.errors import SiteError
from lorac.variants.base import ParamSpec, Role, Site, Tensor, WeightVariant
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
                next_step="give another n_frequency, or exclude= the module",
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
