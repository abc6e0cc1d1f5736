"""PEFT type HRA.

Source: peft.tuners.hra of PEFT 0.21 (config.py, layer.py). In a file, per site, `hra_u` (in, r), at convolutions
(in·kh·kw, r). At a dilated convolution PEFT forgets the dilation unless it merges: here it is what PEFT merges.
"""

from __future__ import annotations

import torch

from lorac.formats._site_layouts import matrix_site
from lorac.formats.peft import config
from lorac.formats.peft.fields import PLACES, bias, mismatched_shapes, only
from lorac.formats.peft.peft_type import Field, FieldUse, PeftType, Tensors
from lorac.ir.sites import Site, SiteKind
from lorac.variants.base import Variant
from lorac.variants.hra import HRA

Tensor = torch.Tensor
VECTORS = "hra_u"

FIELDS = {
    **{name: field for name, field in config.COMMON.items() if name != "fan_in_fan_out"},
    **PLACES,
    "r": Field(FieldUse.APPLIED, 8, to="r", read=config.rank),
    "apply_GS": Field(FieldUse.APPLIED, False, to="apply_GS", read=config.flag),
    "bias": bias("hra"),
    "init_weights": Field(FieldUse.TRAINING, True),
}


def read_site(variant: Variant, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
    """U (in, r), and a site of which only the inputs are known.

    Raises:
        AdapterError: It is no matrix.
    """
    vectors = stored[VECTORS]
    if vectors.ndim != 2:
        raise mismatched_shapes(path, stored, f"{VECTORS} is (in, r)")
    return matrix_site(path, 1, vectors.shape[0]), {VECTORS: vectors}


check_site = only("HRA", {SiteKind.LINEAR, SiteKind.CONV2D})


def write_site(variant: Variant, site: Site, tensors: Tensors) -> dict[str, Tensor]:
    """The tensors of one site in the file's shapes, by suffix.

    Raises:
        SiteError: PEFT does not adapt the layer.
    """
    check_site(site, tensors)
    return {VECTORS: tensors[VECTORS]}


METHOD = PeftType(
    peft_type="HRA",
    variants={HRA: {}},
    fields=FIELDS,
    suffixes=(VECTORS,),
    read_site=read_site,
    write_site=write_site,
    lays_out=False,
    check_site=check_site,
)
