"""PEFT type LN_TUNING.

Source: peft.tuners.ln_tuning of PEFT 0.21 (config.py, layer.py). In a file `<module>.ln_tuning_layers.<parameter>`,
buffers too: a trained copy of every targeted module, which takes its place. PEFT runs one such adapter at a time.
"""

from __future__ import annotations

from typing import Any

import torch

from lorac.formats.peft import config
from lorac.formats.peft.fields import PLACES, mismatched_shapes
from lorac.formats.peft.peft_type import Field, FieldUse, PeftType, Tensors
from lorac.ir.sites import Site
from lorac.variants.base import Variant
from lorac.variants.ln_tuning import LNTuning


def modules(value: Any) -> str | tuple[str, ...]:
    """A list of names, or one regular expression; PEFT writes what it chose itself."""
    found = config.pattern(value)
    if not found:
        raise ValueError("expected names of modules, or a pattern")
    return found


FIELDS = {
    **{name: field for name, field in config.COMMON.items() if name != "fan_in_fan_out"},
    "target_modules": Field(FieldUse.APPLIED, to="targets", read=modules, write=config.sorted_or_none),
    "exclude_modules": PLACES["exclude_modules"],
}


def read_site(variant: Variant, path: str, stored: Tensors) -> tuple[Site, dict[str, torch.Tensor]]:
    """Refuse: a file has no tensors of sites."""
    raise mismatched_shapes(path, stored, "LN_TUNING replaces whole modules")


def write_site(variant: Variant, site: Site, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Refuse: the method has no tensors of sites."""
    raise mismatched_shapes(site.path, tensors, "LN_TUNING replaces whole modules")


METHOD = PeftType(
    peft_type="LN_TUNING",
    variants={LNTuning: {}},
    fields=FIELDS,
    suffixes=(),
    copied="ln_tuning_layers",
    read_site=read_site,
    write_site=write_site,
)
