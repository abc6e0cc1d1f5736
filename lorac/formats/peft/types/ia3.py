"""PEFT type IA3.

Source: peft.tuners.ia3 of PEFT 0.21 (config.py, layer.py). In a file, per site, `ia3_l`: (out, 1), or (1, in) in
feedforward modules; (1, C, 1, 1[, 1]) at convolutions, C their output or input channels. The file tells one side of a
layer only.
"""

from __future__ import annotations

import re

import torch

from lorac.formats._site_layouts import conv_site, matrix_site
from lorac.formats.peft import config
from lorac.formats.peft.fields import PLACES, mismatched_shapes, only
from lorac.formats.peft.peft_type import Field, FieldUse, PeftType, Tensors
from lorac.ir.sites import Site, SiteKind
from lorac.variants.base import Variant
from lorac.variants.ia3 import IA3

Tensor = torch.Tensor
SCALE = "ia3_l"


def _feedforward(value: str | tuple[str, ...]) -> str | list[str]:
    """As one pattern: PEFT wants a list of these to be part of the list of targets, which may be written otherwise.

    An empty list stays one, for null means a choice of PEFT's own.
    """
    if isinstance(value, str):
        return value
    return f".*({'|'.join(re.escape(name) for name in sorted(value))})" if value else []


FIELDS = {
    **config.COMMON,
    "exclude_modules": PLACES["exclude_modules"],
    "feedforward_modules": Field(FieldUse.APPLIED, to="feedforward", read=config.pattern, write=_feedforward),
    "init_ia3_weights": Field(FieldUse.TRAINING, True),
}


def read_site(variant: Variant, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
    """l (out, 1) or (1, in), and a site with as many features on both sides.

    Raises:
        AdapterError: l is for the other side of the layer, or for none.
    """
    assert isinstance(variant, IA3)
    scale, size = stored[SCALE], stored[SCALE].numel()
    shape = (1, size) if variant.scales_input(path) else (size, 1)
    flat = scale.ndim == len(shape)
    if scale.shape != (shape if flat else (1, size, *(1,) * (scale.ndim - 2))) or not 2 <= scale.ndim <= 5:
        raise mismatched_shapes(
            path, stored, f"{SCALE} is {shape} there, says feedforward_modules; at convolutions (1, C, 1, 1)"
        )
    site = matrix_site(path, size, size) if flat else conv_site(path, size, size, (1,) * (scale.ndim - 2), 1)
    return site, {SCALE: scale.reshape(shape)}


KINDS = {SiteKind.LINEAR, SiteKind.CONV2D, SiteKind.CONV3D}
check_site = only("IA3", KINDS, transposed=True, grouped=True, padded=True)


def write_site(variant: Variant, site: Site, tensors: Tensors) -> dict[str, Tensor]:
    """The tensors of one site in the file's shapes, by suffix.

    Raises:
        SiteError: PEFT does not adapt the layer.
    """
    check_site(site, tensors)
    scale = tensors[SCALE]
    return {SCALE: scale if site.conv is None else scale.reshape(1, -1, *(1,) * len(site.conv.kernel))}


METHOD = PeftType(
    peft_type="IA3",
    variants={IA3: {}},
    fields=FIELDS,
    suffixes=(SCALE,),
    read_site=read_site,
    write_site=write_site,
    lays_out=False,
    check_site=check_site,
)
