"""PEFT type SHIRA: sparse high-rank adapters.

Source: peft.tuners.shira of PEFT 0.21. A site has `shira_weight` (K,) and `shira_indices` (2, K)
int32, row 0 the out index; float32 where Windows wrote them. K = r·(out + in), or PEFT cannot load
the file. Only nn.Linear is adapted, so that fan_in_fan_out never matters.
"""

from __future__ import annotations

from typing import Any

import torch

from lorac.errors import AdapterError, FormatError, SiteError
from lorac.formats._site_layouts import matrix_site
from lorac.formats.peft import config
from lorac.formats.peft.peft_type import Field, FieldUse, PeftType, Tensors
from lorac.ir.sites import Site, SiteKind
from lorac.variants.base import Variant
from lorac.variants.shira import SHiRA

Tensor = torch.Tensor
VALUES, INDICES = "shira_weight", "shira_indices"

FIELDS = {
    **config.COMMON,
    "r": Field(FieldUse.APPLIED, 32, to="r", read=config.rank),
    # The file holds the positions, whatever chose them.
    "mask_type": Field(FieldUse.TRAINING, "random"),
    "random_seed": Field(FieldUse.TRAINING),
    "init_weights": Field(FieldUse.TRAINING, True),
}


def read_site(variant: Variant, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
    """Values (K,) and int64 indices (2, K), and a site that K positions at this r imply.

    Raises:
        AdapterError: They do not belong together, or K is no multiple of r.
    """
    values, indices = stored.get(VALUES), stored.get(INDICES)
    if values is None or indices is None or indices.shape != (2, *values.shape) or values.ndim != 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in stored.items())
        raise AdapterError(
            f"the tensors at '{path}' do not belong together: {shapes}",
            next_step=f"{VALUES} is (K,), {INDICES} (2, K)",
            code="shape_mismatch",
        )
    whole = indices.to(torch.int64)
    if not torch.equal(whole.to(indices.dtype), indices):
        raise AdapterError(
            f"{INDICES} at '{path}' are no whole numbers",
            next_step="save the adapter again in PEFT",
            code="wrong_index",
        )
    r, count = _rank(variant), values.numel()
    rows = int(whole[0].max()) + 1 if count else 0
    if count % r or count // r <= rows:
        raise AdapterError(
            f"{count} values at '{path}' are no r·(out + in) for r = {r}",
            next_step="r must be that of the training",
            code="shape_mismatch",
        )
    return matrix_site(path, rows, count // r - rows), {"indices": whole, "values": values}


def check_site(site: Site, tensors: Tensors) -> None:
    """What only the model can tell: that the layer is an nn.Linear.

    Raises:
        SiteError: PEFT's SHIRA adapts nothing else.
    """
    if site.kind is not SiteKind.LINEAR or site.transposed:
        raise SiteError(
            f"'{site.path}' is no nn.Linear, and PEFT's SHIRA adapts nothing else",
            next_step="use format='native', or LoRA",
            code="site_unsupported",
        )


def write_site(variant: Variant, site: Site, tensors: Tensors) -> dict[str, Tensor]:
    """The tensors of one site in the file's shapes, by suffix.

    Raises:
        SiteError: As `check_site`.
        FormatError: The number of values is not PEFT's r·(out + in).
    """
    check_site(site, tensors)
    count, r = tensors["values"].numel(), _rank(variant)
    if count != r * (site.out_features + site.in_features):
        raise FormatError(
            f"{count} values at '{site.path}' are not r·(out + in) for r = {r}, as PEFT needs",
            next_step="use format='native', or train with r= instead of ratio=",
            code="unsupported_field",
        )
    return {VALUES: tensors["values"], INDICES: tensors["indices"].to(torch.int32)}


def _rank(variant: Variant) -> Any:
    assert isinstance(variant, SHiRA)
    return variant.r


METHOD = PeftType(
    peft_type="SHIRA",
    variants={SHiRA: {}},
    fields=FIELDS,
    suffixes=(VALUES, INDICES),
    read_site=read_site,
    write_site=write_site,
    lays_out=False,
    check_site=check_site,
)
