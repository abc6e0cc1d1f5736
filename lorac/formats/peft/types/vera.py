"""PEFT type VERA.

Source: peft.tuners.vera of PEFT 0.21. A site has `vera_lambda_b` (out,) and `vera_lambda_d` (r,), all of them share
`base_model.vera_A` (r, largest in) and `base_model.vera_B` (largest out, r), which a file with save_projection=False
leaves out: they are then drawn from projection_prng_key. No tensor tells the inputs of a site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lorac.formats._site_layouts import matrix_site
from lorac.formats.peft import config
from lorac.formats.peft.fields import bias, mismatched_shapes
from lorac.formats.peft.peft_type import Field, FieldUse, PeftType, Tensors
from lorac.formats.peft.shared_tensors import LAYERS, SEEDED, largest, linear, whole
from lorac.ir.sites import Site
from lorac.variants.base import Variant
from lorac.variants.vera import VeRA, draw_projections

Tensor = torch.Tensor
SHARED = ("vera_A", "vera_B")
OWN = ("vera_lambda_b", "vera_lambda_d")

FIELDS = {
    **config.COMMON,
    **LAYERS,
    **SEEDED,
    "r": Field(FieldUse.APPLIED, 256, to="r", read=config.rank),
    "vera_dropout": Field(FieldUse.TRAINING, 0.0, to="dropout", read=config.number),
    "d_initial": Field(FieldUse.TRAINING, 0.1, to="d_initial", read=config.number),
    "bias": bias("vera"),
}


def read_site(variant: Variant, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
    """The tensors of one site, and a site of as many inputs as the largest has.

    Raises:
        AdapterError: They do not belong together.
    """
    names = (*SHARED, *OWN)
    if set(stored) != set(names) or [stored[name].ndim for name in names] != [2, 2, 1, 1]:
        raise mismatched_shapes(
            path, stored, "vera_A is (r, in), vera_B (out, r), vera_lambda_b (out,), vera_lambda_d (r,)"
        )
    site = matrix_site(path, stored["vera_lambda_b"].shape[0], stored["vera_A"].shape[1])
    return site, {name: stored[name] for name in names}


def make_shared(values: Mapping[str, Any], sites: Sequence[Site]) -> dict[str, Tensor]:
    """A and B as PEFT draws them for these sites; nothing where the file promises them."""
    size = largest(values, sites)
    if size is None:
        return {}
    return dict(zip(SHARED, draw_projections(values["r"], *size, values["projection_prng_key"]), strict=True))


METHOD = PeftType(
    peft_type="VERA",
    variants={VeRA: {}},
    fields=FIELDS,
    suffixes=OWN,
    shared=SHARED,
    make_shared=make_shared,
    read_site=read_site,
    write_site=whole("VERA"),
    lays_out=False,
    check_site=linear("VERA"),
)
