"""PEFT type HIRA.

Source: peft.tuners.hira of PEFT 0.21 (config.py, layer.py). Shapes in a file:

    ===========  ==================  =================
    site         A                   B
    ===========  ==================  =================
    linear       (r, in)             (out, r)
    embedding    (r, V)              (d, r)
    convolution  (r, in, *kernel)    (out, r, 1, …)
    ===========  ==================  =================

What rank_pattern says PEFT forgets where it wraps a layer (`dispatch_default`): every site is of rank r.
"""

from __future__ import annotations

import torch

from lorac.errors import FormatError
from lorac.formats._site_layouts import conv_site, matrix_site
from lorac.formats.peft import config
from lorac.formats.peft.fields import PLACES, mismatched_shapes, only
from lorac.formats.peft.peft_type import Field, FieldUse, PeftType, Tensors
from lorac.ir.sites import Site, SiteKind
from lorac.variants.base import MATRIX_KINDS, Variant
from lorac.variants.hira import HiRA

Tensor = torch.Tensor
MATRICES = ("hira_A", "hira_B")
EMBEDDING = ("hira_embedding_A", "hira_embedding_B")

FIELDS = {
    **config.COMMON,
    **PLACES,
    "r": Field(FieldUse.APPLIED, 32, to="r", read=config.rank),
    "rank_pattern": Field(FieldUse.IRRELEVANT, {}),
    "hira_dropout": Field(FieldUse.TRAINING, 0.0, to="dropout", read=config.number),
    "init_weights": Field(FieldUse.TRAINING, True),
}

check_site = only("HIRA", MATRIX_KINDS, transposed=True)


def read_site(variant: Variant, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
    """The tensors of one site as matrices, and the site as its tensors tell it.

    Raises:
        AdapterError: A and B do not belong together, or to no kind of site.
    """
    pair = EMBEDDING if EMBEDDING[0] in stored else MATRICES
    expected = "hira_A is (r, in), hira_B (out, r)"
    if set(stored) != set(pair):
        raise mismatched_shapes(path, stored, expected)
    a, b = (stored[name] for name in pair)
    if not (2 <= a.ndim == b.ndim <= 5 and a.shape[0] == b.shape[1] and b.shape[2:].numel() == 1):
        raise mismatched_shapes(path, stored, expected)
    if a.ndim == 2:
        kind = SiteKind.EMBEDDING if pair is EMBEDDING else SiteKind.LINEAR
        site = matrix_site(path, b.shape[0], a.shape[1], kind)
    else:
        site = conv_site(path, b.shape[0], a.shape[1], tuple(a.shape[2:]), 1)
    return site, dict(zip(MATRICES, (a.flatten(1), b.flatten(1)), strict=True))


def write_site(variant: Variant, site: Site, tensors: Tensors) -> dict[str, Tensor]:
    """The tensors of one site in the file's shapes, by suffix.

    Raises:
        SiteError: PEFT has no such layer.
        FormatError: The site has a rank of its own.
    """
    check_site(site, tensors)
    if tensors["hira_A"].shape[0] != _rank(variant):
        raise FormatError(
            f"'{site.path}' is of rank {tensors['hira_A'].shape[0]} by rank_pattern, which PEFT's HIRA ignores",
            next_step="use format='native', or one r for all",
            code="unsupported_field",
        )
    a, b = (tensors[name] for name in MATRICES)
    if site.conv is not None:
        a, b = a.reshape(-1, *site.kernel[1:]), b.reshape(*b.shape, *(1,) * len(site.conv.kernel))
    return dict(zip(EMBEDDING if site.kind is SiteKind.EMBEDDING else MATRICES, (a, b), strict=True))


def _rank(variant: Variant) -> int:
    assert isinstance(variant, HiRA)
    return variant.r


METHOD = PeftType(
    peft_type="HIRA",
    variants={HiRA: {}},
    fields=FIELDS,
    suffixes=(*MATRICES, *EMBEDDING),
    read_site=read_site,
    write_site=write_site,
    check_site=check_site,
)
