"""The rows of the table of methods, made with the formats' lists of methods."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lorac.adapters.preparation import Preparer
from lorac.analysis.methods import MethodRow, describe_methods
from lorac.formats.peft.config import peft_types
from lorac.ir.sites import BaseReader, Site
from lorac.variants.base import Variant


def method_rows(known: Iterable[type[Variant]]) -> tuple[MethodRow, ...]:
    """Return one row per method: its formula, its normal form, its size and its files."""
    classes = tuple(known)
    files = {variant: ["native"] for variant in classes}
    for name, kind in sorted(peft_types().items()):
        for variant in kind.variants:
            files.setdefault(variant, ["native"]).append(name)
    return describe_methods(classes, Preparer({}, BaseReader(_refuse_base, _refuse_base)).reduction, files)


def _refuse_base(site: Site) -> torch.Tensor:
    raise AssertionError(f"'{site.path}' stands for any layer of its shape")
