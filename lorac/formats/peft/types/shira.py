"""PEFT type SHIRA: sparse high-rank adapters.

Source: peft.tuners.shira of PEFT 0.21. A module has `shira_weight` (K,) and `shira_indices` (2, K) int32, with the out
index in row 0; files from Windows have float32. K must be r·(out + in), or PEFT cannot load the file. Only nn.Linear is
adapted, so fan_in_fan_out has no effect.
"""

import dataclasses

import torch
from torch import Tensor

from lorac.errors import AdapterError, shape_error
from lorac.formats._config_fields import Applied, TrainingOnly, read_size
from lorac.formats._errors import unsupported_error
from lorac.formats._site_layouts import matrix_site
from lorac.formats.peft.fields import COMMON
from lorac.formats.peft.peft_type import PeftType, Tensors, mismatched_shapes
from lorac.ir.sites.site import Site
from lorac.variants.shira import SHiRA

VALUES, INDICES = "shira_weight", "shira_indices"


class ShiraType(PeftType[SHiRA]):
    """SHIRA."""

    peft_type = "SHIRA"
    variants = {SHiRA: {}}
    fields = {
        **COMMON,
        "r": Applied(32, to="r", read=read_size),
        # The file has the positions, so the method that chose them does not matter.
        "mask_type": TrainingOnly("random"),
        "random_seed": TrainingOnly(),
        "init_weights": TrainingOnly(True),
    }
    suffixes = (VALUES, INDICES)

    def read_site(self, variant: SHiRA, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        """Return values (K,) and int64 indices (2, K), and a site for which rank r has K positions."""
        values, indices = stored.get(VALUES), stored.get(INDICES)
        if values is None or indices is None or indices.shape != (2, *values.shape) or values.ndim != 1:
            raise mismatched_shapes(path, stored, f"{VALUES} is (K,), {INDICES} (2, K)")
        positions = indices if indices.is_complex() else indices.to(torch.int64)
        if indices.is_complex() or not torch.equal(positions.to(indices.dtype), indices):
            raise AdapterError(
                f"{INDICES} at '{path}' are not whole numbers",
                next_step="save the adapter again in PEFT",
                code="wrong_index",
            )
        count = values.numel()
        rows = int(positions[0].max()) + 1 if count else 0
        if count % variant.r or count // variant.r <= rows:
            raise shape_error(
                f"{count} values at '{path}' are not r·(out + in) for r = {variant.r}",
                next_step="set r to that of the training",
            )
        return matrix_site(path, rows, count // variant.r - rows), {"indices": positions, "values": values}

    def check_site(self, site: Site, tensors: Tensors) -> None:
        # Where an attention reads a layer's weight itself, PEFT merges the positions too, so the layer is allowed.
        super().check_site(dataclasses.replace(site, within=None), tensors)

    def write_site(self, variant: SHiRA, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        count = tensors["values"].numel()
        if count != variant.r * (site.out_features + site.in_features):
            raise unsupported_error(
                f"{count} values at '{site.path}' are not r·(out + in) for r = {variant.r}, as PEFT needs",
                next_step="use format='native', or train with r= instead of ratio=",
            )
        return {VALUES: tensors["values"], INDICES: tensors["indices"].to(torch.int32)}
