"""PEFT type FOURIERFT.

Source: peft.tuners.fourierft of PEFT 0.21. A module has `fourierft_spectrum` (n,) alone: the positions are the first n
of a permutation of its out·in, drawn from random_loc_seed. PEFT transforms in float32, whatever the dtype of the model.
"""

import torch
from torch import Tensor

from lorac.formats._config_fields import (
    Applied,
    TrainingOnly,
    read_int,
    read_number,
    read_rank_pattern,
    read_size,
    write_number_pattern,
)
from lorac.formats._errors import unsupported_error
from lorac.formats._site_layouts import matrix_site
from lorac.formats.peft.fields import COMMON, FILTERS, bias
from lorac.formats.peft.peft_type import PeftType, Tensors, take_tensors
from lorac.ir.sites.site import Site, SiteKind
from lorac.variants.fourierft import FourierFT

SPECTRUM, INDICES = "fourierft_spectrum", "indices"


class FourierftType(PeftType[FourierFT]):
    """FOURIERFT."""

    peft_type = "FOURIERFT"
    variants = {FourierFT: {}}
    fields = {
        **COMMON,
        **FILTERS,
        "n_frequency": Applied(1000, to="n_frequency", read=read_size),
        "scaling": Applied(150.0, to="scaling", read=read_number),
        "random_loc_seed": Applied(777, to="random_loc_seed", read=read_int),
        "n_frequency_pattern": Applied(
            {}, to="n_frequency_pattern", read=read_rank_pattern, write=write_number_pattern
        ),
        "bias": bias("fourier"),
        "init_weights": TrainingOnly(False),
    }
    suffixes = (SPECTRUM,)
    kinds = frozenset({SiteKind.LINEAR})
    conv1d = True
    needs_model = True

    def read_site(self, variant: FourierFT, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        tensors = take_tensors(path, stored, {SPECTRUM: 1}, f"{SPECTRUM} is (n_frequency,)")
        return matrix_site(path, 1, tensors[SPECTRUM].numel()), tensors

    def complete_site(self, variant: FourierFT, site: Site, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {INDICES: _positions(variant, site), **tensors}

    def write_site(self, variant: FourierFT, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        at_site = variant.at(site)
        assert isinstance(at_site, FourierFT)
        if not torch.equal(_positions(at_site, site), tensors[INDICES].cpu()):
            raise unsupported_error(
                f"the positions at '{site.path}' are not those that random_loc_seed chooses, and PEFT stores none",
                next_step="use format='native'",
            )
        return {SPECTRUM: tensors[SPECTRUM]}


def _positions(variant: FourierFT, site: Site) -> Tensor:
    variant.check(site)
    return variant.positions(site)
