"""PEFT type BOFT.

Source: peft.tuners.boft of PEFT 0.21 (config.py, layer.py). In a file, per site, `boft_R` (m, blocks, β, β) and
`boft_s` (out, 1), at convolutions (1, out). Without its CUDA extension PEFT takes one factor, whatever is configured;
such a file's boft_R has one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from lorac.formats._site_layouts import conv_site, matrix_site
from lorac.formats.peft import config
from lorac.formats.peft.fields import PLACES, bias, count, mismatched_shapes, only
from lorac.formats.peft.peft_type import Field, FieldUse, PeftType, Tensors
from lorac.ir.sites import Site, SiteKind
from lorac.variants.base import Variant
from lorac.variants.boft import BOFT

Tensor = torch.Tensor
ROTATION, SCALE = "boft_R", "boft_s"


FIELDS = {
    **config.COMMON,
    **PLACES,
    "boft_block_size": Field(FieldUse.APPLIED, 4, to="block_size", read=count),
    "boft_block_num": Field(FieldUse.APPLIED, 0, to="block_num", read=count),
    "boft_n_butterfly_factor": Field(FieldUse.APPLIED, 1, to="n_butterfly_factor", read=config.rank),
    "boft_dropout": Field(FieldUse.TRAINING, 0.0),
    "bias": bias("boft"),
    "init_weights": Field(FieldUse.TRAINING, True),
}


def read_site(variant: Variant, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
    """boft_R (m, blocks, β, β) and s (out, 1), and a site whose kernel is left open.

    Raises:
        AdapterError: They do not belong together.
    """
    rotation, scale = stored.get(ROTATION), stored.get(SCALE)
    if rotation is None or scale is None or rotation.ndim != 4 or scale.ndim != 2 or 1 not in scale.shape:
        raise mismatched_shapes(path, stored, f"{ROTATION} is (m, blocks, size, size), {SCALE} (out, 1), or (1, out)")
    out, columns = scale.numel(), rotation.shape[1] * rotation.shape[2]
    column = scale.shape[1] == 1
    site = matrix_site(path, out, columns) if column else conv_site(path, out, columns, (1, 1), 1)
    return site, {ROTATION: rotation, SCALE: scale.reshape(-1, 1)}


def settled(variant: Variant, sites: Mapping[str, Tensors]) -> Variant:
    """The variant with as many factors as the tensors have: one, where PEFT wrote them without its CUDA extension."""
    factors = {len(stored[ROTATION]) for stored in sites.values() if ROTATION in stored and stored[ROTATION].ndim}
    assert isinstance(variant, BOFT)
    return dataclasses.replace(variant, n_butterfly_factor=1) if factors == {1} else variant


check_site = only("BOFT", {SiteKind.LINEAR, SiteKind.CONV2D})


def write_site(variant: Variant, site: Site, tensors: Tensors) -> dict[str, Tensor]:
    """The tensors of one site in the file's shapes, by suffix.

    Raises:
        SiteError: PEFT does not adapt the layer.
    """
    check_site(site, tensors)
    scale = tensors[SCALE]
    return {ROTATION: tensors[ROTATION], SCALE: scale if site.conv is None else scale.t()}


METHOD = PeftType(
    peft_type="BOFT",
    variants={BOFT: {}},
    fields=FIELDS,
    suffixes=(ROTATION, SCALE),
    read_site=read_site,
    write_site=write_site,
    lays_out=False,
    check_site=check_site,
    settled=settled,
)
