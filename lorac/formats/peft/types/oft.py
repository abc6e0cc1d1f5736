"""PEFT type OFT.

Source: peft.tuners.oft of PEFT 0.21 (config.py, layer.py). In a file, per site, `oft_R.weight` (blocks, β(β−1)/2), at
embeddings `oft_embedding_R.weight`. Before 0.16 files held whole matrices under `oft_r`; before 0.18 the series had
another last term, and PEFT warns of such files. At convolutions PEFT's forward pass rotates patches and adds them up
where they overlap, which is not what it merges: here it is what PEFT merges.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from lorac.formats._site_layouts import matrix_site
from lorac.formats.peft import config
from lorac.formats.peft.fields import PLACES, bias, count, mismatched_shapes, only
from lorac.formats.peft.peft_type import Field, FieldUse, PeftType, Tensors
from lorac.ir.sites import Site, SiteKind
from lorac.variants.base import Variant
from lorac.variants.oft import OFT

Tensor = torch.Tensor
SUFFIXES = {"oft_R.weight": "oft_R", "oft_embedding_R.weight": "oft_embedding_R"}
_SERIES = "0.18.0"
"""The release that changed the series' last term."""


def series(value: Any) -> str:
    """The version of PEFT, reduced to the last one that changed what is computed."""
    numbers = re.match(r"(\d+)\.(\d+)", value) if isinstance(value, str) else None
    if numbers is None or (int(numbers[1]), int(numbers[2])) < (0, 18):
        raise ValueError("OFT of PEFT before 0.18 rotates by another series; load it there and train it again")
    return _SERIES


FIELDS = {
    **config.COMMON,
    **PLACES,
    "peft_version": Field(FieldUse.APPLIED, read=series),
    "r": Field(FieldUse.APPLIED, 0, to="r", read=count),
    "oft_block_size": Field(FieldUse.APPLIED, 32, to="block_size", read=count),
    "block_share": Field(FieldUse.APPLIED, False, to="block_share", read=config.flag),
    "use_cayley_neumann": Field(FieldUse.APPLIED, True, to="use_cayley_neumann", read=config.flag),
    "num_cayley_neumann_terms": Field(FieldUse.APPLIED, 5, to="num_cayley_neumann_terms", read=config.rank),
    "coft": Field(FieldUse.APPLIED, False, to="coft", read=config.flag),
    "eps": Field(FieldUse.APPLIED, 6e-5, to="eps", read=config.number),
    "bias": bias("oft"),
    # PEFT makes a dropout layer of it and never calls it.
    "module_dropout": Field(FieldUse.IRRELEVANT, 0.0),
    "init_weights": Field(FieldUse.TRAINING, True),
}


def read_site(variant: Variant, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
    """The upper triangles (blocks, β(β−1)/2), and a site as wide as they need.

    Raises:
        AdapterError: There is none, or it is no set of triangles.
    """
    assert isinstance(variant, OFT)
    ((suffix, upper), *more) = stored.items()
    size = round((1 + (1 + 8 * upper.shape[-1]) ** 0.5) / 2) if upper.ndim == 2 else 0
    if more or upper.ndim != 2 or size * (size - 1) != 2 * upper.shape[1]:
        raise mismatched_shapes(path, stored, "they are (blocks, size·(size − 1)/2)")
    # Of a shared block the file tells the size, not how often it is used.
    width = size * (len(upper) if not variant.block_share else variant.r or 1)
    embedding = SUFFIXES[suffix] == "oft_embedding_R"
    site = matrix_site(path, width, 1, SiteKind.EMBEDDING) if embedding else matrix_site(path, 1, width)
    return site, {SUFFIXES[suffix]: upper}


check_site = only("OFT", {SiteKind.LINEAR, SiteKind.EMBEDDING, SiteKind.CONV2D})


def write_site(variant: Variant, site: Site, tensors: Tensors) -> dict[str, Tensor]:
    """The tensors of one site in the file's shapes, by suffix.

    Raises:
        SiteError: PEFT does not adapt the layer.
    """
    check_site(site, tensors)
    return {suffix: tensors[name] for suffix, name in SUFFIXES.items() if name in tensors}


METHOD = PeftType(
    peft_type="OFT",
    variants={OFT: {"peft_version": _SERIES}},
    fields=FIELDS,
    suffixes=tuple(SUFFIXES),
    read_site=read_site,
    write_site=write_site,
    lays_out=False,
    check_site=check_site,
)
