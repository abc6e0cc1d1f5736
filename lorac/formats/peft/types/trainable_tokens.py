"""PEFT type TRAINABLE_TOKENS.

Source: peft.tuners.trainable_tokens of PEFT 0.21. A file holds, per module, ``trainable_tokens_delta`` (n, d): what
takes the place of the n rows whose numbers its configuration has. An output layer that is tied to the input embedding
reads the same rows, and a file has them again for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lorac.formats._site_layouts import matrix_site
from lorac.formats.peft import config
from lorac.formats.peft.fields import mismatched_shapes
from lorac.formats.peft.peft_type import Field, FieldUse, PeftType, Tensors
from lorac.ir.sites import Site, SiteKind
from lorac.variants.base import Variant
from lorac.variants.trainable_tokens import TrainableTokens

Tensor = torch.Tensor
DELTA = "trainable_tokens_delta"


def tokens(value: Any) -> tuple[int, ...]:
    """Numbers of rows, each once."""
    found = config.layers(value)
    if not found or min(found) < 0 or len(set(found)) < len(found):
        raise ValueError("expected numbers of rows, each once")
    return found


FIELDS = {
    **{name: field for name, field in config.COMMON.items() if name not in {"fan_in_fan_out", "modules_to_save"}},
    "token_indices": Field(FieldUse.APPLIED, [], to="token_indices", read=tokens, write=list),
    "init_weights": Field(FieldUse.TRAINING, True),
}


def spread(stored: Mapping[str, Tensors], sites: Mapping[str, Site]) -> dict[str, str]:
    """Layers that are tied to an embedding whose rows a file has -> that embedding."""
    embeddings = [sites[path] for path in stored if path in sites and sites[path].kind is SiteKind.EMBEDDING]
    return {other: site.path for site in embeddings for other in site.shares}


def read_site(variant: Variant, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
    """The rows as columns of an embedding, and an embedding that they would do for.

    Raises:
        AdapterError: They are no rows.
    """
    if set(stored) != {DELTA} or stored[DELTA].ndim != 2:
        raise mismatched_shapes(path, stored, f"{DELTA} is (n, d)")
    delta = stored[DELTA]
    return matrix_site(path, delta.shape[1], len(delta), SiteKind.EMBEDDING), {"columns": delta.t()}


def make_site(variant: Variant, site: Site, tensors: Tensors) -> dict[str, Tensor]:
    """The rows as the layer takes them, and their numbers."""
    assert isinstance(variant, TrainableTokens)
    index = torch.tensor([variant.token_indices], dtype=torch.int64)
    columns = tensors["columns"]
    return {"index": index} | ({"columns": columns} if site.kind is SiteKind.EMBEDDING else {"rows": columns.t()})


def write_site(variant: Variant, site: Site, tensors: Tensors) -> dict[str, Tensor]:
    """The rows of one layer."""
    return {DELTA: tensors["columns"].t() if "columns" in tensors else tensors["rows"]}


METHOD = PeftType(
    peft_type="TRAINABLE_TOKENS",
    variants={TrainableTokens: {}},
    fields=FIELDS,
    suffixes=(DELTA,),
    crossed={"rows": "columns"},
    read_site=read_site,
    make_site=make_site,
    write_site=write_site,
    spread=spread,
    lays_out=False,
)
