"""PEFT type ADALORA.

Source: peft.tuners.adalora of PEFT 0.21. A site has `lora_A` (r, in), a kernel's flat, `lora_E` (r, 1) and `lora_B`
(out, r), of the r singular values that were kept; which of the init_r these are says rank_pattern. The scale stays
lora_alpha / (init_r + 1e-5). Of LORA's fields PEFT ignores those that are IRRELEVANT here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lorac.formats._site_layouts import matrix_site
from lorac.formats.peft import config
from lorac.formats.peft.fields import mismatched_shapes, only
from lorac.formats.peft.peft_type import Field, FieldUse, PeftType, Tensors
from lorac.formats.peft.types import lora
from lorac.ir.sites import Site, SiteKind
from lorac.variants.adalora import AdaLoRA
from lorac.variants.base import Variant

Tensor = torch.Tensor
NAMES = ("lora_A", "lora_E", "lora_B")
_MARKS = "expected a mapping of <path>.lora_E to lists of true and false"
_NEVER = "train the adapter again without it: PEFT's AdaLoRA refuses it, too"


def scale(value: Any) -> float:
    """A number above 0; anything else PEFT replaces by the rank."""
    if config.number(value) <= 0:
        raise ValueError("expected a number above 0")
    return float(value)


def marks(value: Any) -> dict[str, tuple[bool, ...]]:
    """Path of a site -> which of its singular values were kept."""
    found = {}
    if value is not None and not isinstance(value, dict):
        raise ValueError(_MARKS)
    for name, kept in (value or {}).items():
        path, _, adapter = name.rpartition(".lora_E")
        if not path or "." in adapter[1:] or not isinstance(kept, list) or not all(isinstance(m, bool) for m in kept):
            raise ValueError(_MARKS)
        found[path] = tuple(kept)
    return found


def names_of(found: Mapping[str, tuple[bool, ...]]) -> dict[str, list[bool]] | None:
    """The file's rank_pattern; null for none."""
    return {f"{path}.lora_E": list(kept) for path, kept in found.items()} or None


FIELDS: dict[str, Field] = {
    **lora.FIELDS,
    "init_r": Field(FieldUse.APPLIED, 12, to="r", read=config.rank),
    "lora_alpha": Field(FieldUse.APPLIED, 8, to="alpha", read=scale, write=config.whole),
    "rank_pattern": Field(FieldUse.APPLIED, to="rank_pattern", read=marks, write=names_of),
    "r": Field(FieldUse.IRRELEVANT, 8),
    "use_rslora": Field(FieldUse.IRRELEVANT, False),
    "lora_bias": Field(FieldUse.IRRELEVANT, False),
    "alpha_pattern": Field(FieldUse.IRRELEVANT, {}),
    "use_dora": lora.refused(_NEVER, False),
    "loftq_config": lora.refused(_NEVER, {}),
    "target_r": Field(FieldUse.TRAINING, 8, kept=True),
    "tinit": Field(FieldUse.TRAINING, 0, kept=True),
    "tfinal": Field(FieldUse.TRAINING, 0, kept=True),
    "deltaT": Field(FieldUse.TRAINING, 1, kept=True),
    "beta1": Field(FieldUse.TRAINING, 0.85, kept=True),
    "beta2": Field(FieldUse.TRAINING, 0.85, kept=True),
    "orth_reg_weight": Field(FieldUse.TRAINING, 0.5, kept=True),
    # PEFT refuses to read a configuration without a number of steps.
    "total_step": Field(FieldUse.TRAINING, kept=True, write=lambda steps: steps or 1),
}

check_site = only("ADALORA", {SiteKind.LINEAR, SiteKind.CONV2D}, transposed=True)


def read_site(variant: Variant, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
    """The tensors of one site, and a linear site of their shapes.

    Raises:
        AdapterError: They do not belong together.
    """
    if set(stored) != set(NAMES) or any(stored[name].ndim != 2 for name in NAMES):
        raise mismatched_shapes(path, stored, "lora_A is (r, in), lora_E (r, 1), lora_B (out, r)")
    site = matrix_site(path, stored["lora_B"].shape[0], stored["lora_A"].shape[1])
    return site, {name: stored[name] for name in NAMES}


def write_site(variant: Variant, site: Site, tensors: Tensors) -> dict[str, Tensor]:
    """The tensors of one site, by suffix.

    Raises:
        SiteError: PEFT has no such layer.
    """
    check_site(site, tensors)
    return dict(tensors)


METHOD = PeftType(
    peft_type="ADALORA",
    variants={AdaLoRA: {}},
    fields=FIELDS,
    retired=lora.RETIRED,
    suffixes=NAMES,
    read_site=read_site,
    write_site=write_site,
    # A flat A does not tell a convolution from a linear layer.
    lays_out=False,
    check_site=check_site,
)
