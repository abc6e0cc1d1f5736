"""PEFT type FOURIERFT.

Source: peft.tuners.fourierft of PEFT 0.21. A site has `fourierft_spectrum` (n,) alone: the positions are the first n
of a permutation of its out·in, drawn from random_loc_seed. PEFT transforms in float32, whatever the model's dtype.
"""

from __future__ import annotations

from typing import Any

import torch

from lorac.errors import FormatError
from lorac.formats._site_layouts import matrix_site
from lorac.formats.peft import config
from lorac.formats.peft.fields import PLACES, mismatched_shapes, only
from lorac.formats.peft.peft_type import Field, FieldUse, PeftType, Tensors
from lorac.ir.sites import Site, SiteKind
from lorac.variants.base import Variant
from lorac.variants.fourierft import FourierFT

Tensor = torch.Tensor
SPECTRUM, INDICES = "fourierft_spectrum", "indices"


def seed(value: Any) -> int:
    """A whole number; PEFT cannot draw from null."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("expected a whole number")
    return value


def bias(value: Any) -> str:
    """Which biases are trained."""
    if value not in ("none", "all", "fourier_only"):
        raise ValueError("expected none, all or fourier_only")
    return str(value)


FIELDS = {
    **config.COMMON,
    **PLACES,
    "n_frequency": Field(FieldUse.APPLIED, 1000, to="n_frequency", read=config.rank),
    "scaling": Field(FieldUse.APPLIED, 150.0, to="scaling", read=config.number),
    "random_loc_seed": Field(FieldUse.APPLIED, 777, to="random_loc_seed", read=seed),
    "n_frequency_pattern": Field(
        FieldUse.APPLIED, {}, to="n_frequency_pattern", read=config.ranks, write=config.mapping
    ),
    "bias": Field(FieldUse.APPLIED, "none", to="bias", read=bias, write=lambda b: config.bias_name(b, "fourier")),
    "init_weights": Field(FieldUse.TRAINING, False),
}

check_site = only("FOURIERFT", {SiteKind.LINEAR}, transposed=True)


def read_site(variant: Variant, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
    """The spectrum; no tensor tells the site.

    Raises:
        AdapterError: It is no vector.
    """
    if set(stored) != {SPECTRUM} or stored[SPECTRUM].ndim != 1:
        raise mismatched_shapes(path, stored, f"{SPECTRUM} is (n_frequency,)")
    return matrix_site(path, 1, stored[SPECTRUM].numel()), dict(stored)


def make_site(variant: Variant, site: Site, tensors: Tensors) -> dict[str, Tensor]:
    """With the positions (2, n) that the seed chooses."""
    return {INDICES: _positions(variant, site), **tensors}


def _positions(variant: Variant, site: Site) -> Tensor:
    assert isinstance(variant, FourierFT)
    variant.check(site)
    return variant.positions(site)


def write_site(variant: Variant, site: Site, tensors: Tensors) -> dict[str, Tensor]:
    """The spectrum, by suffix.

    Raises:
        SiteError: PEFT has no such layer.
        FormatError: The positions are not those of the seed, which are all that PEFT knows.
    """
    check_site(site, tensors)
    if not torch.equal(_positions(variant.at(site), site), tensors[INDICES].cpu()):
        raise FormatError(
            f"the positions at '{site.path}' are not those that random_loc_seed chooses, and PEFT stores none",
            next_step="use format='native'",
            code="unsupported_field",
        )
    return {SPECTRUM: tensors[SPECTRUM]}


METHOD = PeftType(
    peft_type="FOURIERFT",
    variants={FourierFT: {}},
    fields=FIELDS,
    suffixes=(SPECTRUM,),
    read_site=read_site,
    write_site=write_site,
    make_site=make_site,
    lays_out=False,
    check_site=check_site,
)
