"""PEFT type MISS: MiSS and its mini form, and BAT.

Source: peft.tuners.miss of PEFT 0.21. A site has one tensor `miss_block`: (r, out), mini (r, mini_r), BAT
(out/r, r, r); `init_weights` tells which. Only nn.Linear is adapted, whose inputs no tensor counts. Several BATs
active together PEFT applies one after the other, each to the weight that the one before left; lorac adds up what
each does to the base.
"""

from __future__ import annotations

from typing import Any

import torch

from lorac.formats._site_layouts import matrix_site
from lorac.formats.peft import config
from lorac.formats.peft.fields import PLACES, mismatched_shapes, only
from lorac.formats.peft.peft_type import Field, FieldUse, PeftType, Tensors
from lorac.ir.sites import Site, SiteKind
from lorac.variants.base import Variant
from lorac.variants.bat import BAT
from lorac.variants.miss import MiSS

Tensor = torch.Tensor
BLOCK = "miss_block"


def form(value: Any) -> Any:
    """What init_weights picks: `"bat"`, or whether it is mini."""
    if value is None or isinstance(value, bool):
        return False
    if value not in ("bat", "mini"):
        raise ValueError("expected true, false, bat or mini")
    return "bat" if value == "bat" else True


def bias(value: Any) -> str:
    """Which biases are trained."""
    if value not in ("none", "all", "MiSS_only"):
        raise ValueError("expected none, all or MiSS_only")
    return str(value)


FIELDS = {
    **{name: field for name, field in config.COMMON.items() if name != "fan_in_fan_out"},
    **PLACES,
    "r": Field(FieldUse.APPLIED, 64, to="r", read=config.rank),
    "mini_r": Field(FieldUse.APPLIED, 1, to="mini_r", read=config.rank),
    "miss_dropout": Field(FieldUse.TRAINING, 0.0, to="dropout", read=config.number),
    "init_weights": Field(FieldUse.APPLIED, True, to="mini", read=form, write=lambda mini: "mini" if mini else True),
    "bias": Field(FieldUse.APPLIED, "none", to="bias", read=bias, write=lambda b: config.bias_name(b, "MiSS")),
}

check_site = only("MISS", {SiteKind.LINEAR})


def read_site(variant: Variant, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
    """The block, and a site as large as it tells: r inputs, and of a mini form mini_r outputs.

    Raises:
        AdapterError: The block is of another form than the configuration says.
    """
    block = stored[BLOCK]
    axes = 3 if isinstance(variant, BAT) else 2
    if block.ndim != axes:
        raise mismatched_shapes(
            path, stored, "a block of 3 axes is of init_weights='bat', one of 2 of true, false or 'mini'"
        )
    out = block.shape[0] * block.shape[1] if isinstance(variant, BAT) else block.shape[1]
    return matrix_site(path, out, _rank(variant)), {BLOCK: block}


def write_site(variant: Variant, site: Site, tensors: Tensors) -> dict[str, Tensor]:
    """The block of one site, by suffix.

    Raises:
        SiteError: PEFT's MiSS adapts nn.Linear only.
    """
    check_site(site, tensors)
    return {BLOCK: tensors[BLOCK]}


def _rank(variant: Variant) -> Any:
    assert isinstance(variant, BAT | MiSS)
    return variant.r


METHOD = PeftType(
    peft_type="MISS",
    variants={BAT: {"init_weights": "bat"}, MiSS: {}},
    fields=FIELDS,
    suffixes=(BLOCK,),
    read_site=read_site,
    write_site=write_site,
    lays_out=False,
    check_site=check_site,
)
