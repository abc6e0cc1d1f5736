"""PEFT type RANDLORA.

Source: peft.tuners.randlora of PEFT 0.21. With d and D the smaller and the larger of out and in, and n = ⌈d/r⌉, a site
has `randlora_lambda` (r, n) and `randlora_gamma` (n, d), and all of them share `randlora_A` (r, 1, d) and `randlora_B`
(D, n, r) for the smaller and the larger of the largest out and the largest in. PEFT writes those two once as
`base_model.<name>` and once more at every site; lorac writes them once, which PEFT reads, with a warning that it misses
the copies. With save_projection=False they are left out, to be drawn from projection_prng_key. No tensor tells the
larger side of a site.
"""

from __future__ import annotations

import math
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
from lorac.variants.randlora import RandLoRA, draw_bases

Tensor = torch.Tensor
SHARED = ("randlora_A", "randlora_B")
OWN = ("randlora_lambda", "randlora_gamma")

FIELDS = {
    **config.COMMON,
    **LAYERS,
    **SEEDED,
    "r": Field(FieldUse.APPLIED, 32, to="r", read=config.rank),
    "randlora_alpha": Field(FieldUse.APPLIED, 640, to="alpha", read=config.number, write=config.whole),
    "randlora_dropout": Field(FieldUse.TRAINING, 0.0, to="dropout", read=config.number),
    # How A and B are drawn: without save_projection that is what they are.
    "sparse": Field(FieldUse.APPLIED, False, to="sparse", read=config.flag),
    "very_sparse": Field(FieldUse.APPLIED, False, to="very_sparse", read=config.flag),
    "bias": bias("randlora"),
}


def read_site(variant: Variant, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
    """The tensors of one site, and a site whose larger side is as large as its smaller.

    Raises:
        AdapterError: They do not belong together.
    """
    names = (*SHARED, *OWN)
    if set(stored) != set(names) or [stored[name].ndim for name in names] != [3, 3, 2, 2]:
        raise mismatched_shapes(
            path, stored, "randlora_lambda is (r, n), randlora_gamma (n, d), A (r, 1, d) and B (D, n, r)"
        )
    small = stored["randlora_gamma"].shape[1]
    return matrix_site(path, small, small), {name: stored[name] for name in names}


def make_shared(values: Mapping[str, Any], sites: Sequence[Site]) -> dict[str, Tensor]:
    """A and B as PEFT draws them for these sites; nothing where the file promises them."""
    size = largest(values, sites)
    if size is None:
        return {}
    r, key = values["r"], values["projection_prng_key"]
    small, large = sorted(size)
    sparsity = RandLoRA(r=r, sparse=values["sparse"], very_sparse=values["very_sparse"]).sparsity(small)
    drawn = draw_bases((r, 1, small), (large, math.ceil(small / r), r), key=key, sparsity=sparsity)
    return dict(zip(SHARED, drawn, strict=True))


def shared_shapes(variant: Variant, sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
    """Shapes of A and B by the largest out and the largest in, which may be of different sites."""
    assert isinstance(variant, RandLoRA)
    small, large = sorted((max(site.out_features for site in sites), max(site.in_features for site in sites)))
    count = math.ceil(small / variant.r)
    return dict(zip(SHARED, ((variant.r, 1, small), (large, count, variant.r)), strict=True))


METHOD = PeftType(
    peft_type="RANDLORA",
    variants={RandLoRA: {}},
    fields=FIELDS,
    suffixes=OWN,
    shared=SHARED,
    make_shared=make_shared,
    shared_shapes=shared_shapes,
    read_site=read_site,
    write_site=whole("RANDLORA"),
    lays_out=False,
    check_site=linear("RANDLORA"),
)
