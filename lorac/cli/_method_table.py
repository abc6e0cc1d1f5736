"""The rows of the table of methods, made with the formats' lists of methods."""

from collections.abc import Collection, Iterable

import torch

from lorac.adapters.preparation import Preparer
from lorac.analysis.methods import MethodRow, describe_methods
from lorac.formats import formats
from lorac.formats.peft.config import peft_types
from lorac.ir.sites.site import BaseReader, Site
from lorac.variants.base import Variant


def method_rows(known: Iterable[type[Variant]]) -> tuple[MethodRow, ...]:
    """Return one row per method: its formula, its normal form, its size and its files."""
    classes = tuple(known)
    files = {variant: ["native"] for variant in classes}
    by_name: dict[str, Collection[type[Variant]]] = {name: kind.variants for name, kind in peft_types().items()}
    by_name |= {name: format.methods for name, format in formats().items()}
    for name, holds in sorted(by_name.items()):
        for variant in holds:
            files.setdefault(variant, ["native"]).append(name)
    return describe_methods(classes, Preparer({}, BaseReader(_refuse_base, _refuse_base)).reduction, files)


def _refuse_base(site: Site) -> torch.Tensor:
    raise AssertionError(f"'{site.path}' stands for any layer of its shape")
