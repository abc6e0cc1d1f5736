"""What several PEFT types have in common: tables of fields, and what they say of sites that are not theirs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

from lorac.errors import AdapterError, SiteError, warn
from lorac.formats.peft import config
from lorac.formats.peft.peft_type import Field, FieldUse, Tensors
from lorac.ir.sites import Site, SiteKind

PLACES = {
    "exclude_modules": Field(FieldUse.APPLIED, to="exclude", read=config.pattern, write=config.sorted_or_none),
    "layers_to_transform": Field(FieldUse.APPLIED, to="layers", read=config.layers, write=config.list_or_none),
    "layers_pattern": Field(FieldUse.APPLIED, to="layers_pattern", read=config.names, write=config.list_or_none),
}
"""Fields that narrow target_modules."""

LYCORIS = {
    **{name: field for name, field in config.COMMON.items() if name != "fan_in_fan_out"},
    **PLACES,
    "r": Field(FieldUse.APPLIED, 8, to="r", read=config.rank),
    "alpha": Field(FieldUse.APPLIED, 8, to="alpha", read=config.number, write=config.whole),
    "rank_pattern": Field(FieldUse.APPLIED, {}, to="rank_pattern", read=config.ranks, write=config.mapping),
    "alpha_pattern": Field(FieldUse.APPLIED, {}, to="alpha_pattern", read=config.numbers, write=config.mapping),
    "use_effective_conv2d": Field(FieldUse.APPLIED, False, to="effective_conv2d", read=config.flag),
    # PEFT drops rows of the update, or the whole of it.
    "rank_dropout": Field(FieldUse.TRAINING, 0.0, kept=True),
    "module_dropout": Field(FieldUse.TRAINING, 0.0, kept=True),
    "init_weights": Field(FieldUse.TRAINING, True),
}
"""Fields of LOHA, all of which LOKR has, too."""
LYCORIS_KINDS = frozenset({SiteKind.LINEAR, SiteKind.CONV1D, SiteKind.CONV2D})
"""What LOHA and LOKR adapt."""


def bias(prefix: str) -> Field:
    """Which biases are trained: none, all or ``<prefix>_only``."""
    allowed = ("none", "all", f"{prefix}_only")

    def read(value: Any) -> str:
        if value not in allowed:
            raise ValueError(f"expected {allowed[0]}, {allowed[1]} or {allowed[2]}")
        return str(value)

    return Field(FieldUse.APPLIED, "none", to="bias", read=read, write=lambda b: config.bias_name(b, prefix))


def count(value: Any) -> int:
    """A whole number from 0."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= config.MAX_COUNT:
        raise ValueError(f"expected a whole number from 0, at most {config.MAX_COUNT}")
    return value


def only(
    peft_type: str,
    kinds: Collection[SiteKind],
    *,
    transposed: bool = False,
    grouped: bool = False,
    padded: bool = False,
) -> Callable[[Site, Tensors], None]:
    """A check that PEFT's type adapts a site; a warning where it computes there what no weight does.

    Args:
        peft_type: The type, for messages.
        kinds: Kinds of site that it adapts.
        transposed: Whether GPT-2's Conv1D is among them.
        grouped: Whether convolutions of several groups are.
        padded: Whether it runs on what the convolution itself pads.
    """

    def check(site: Site, tensors: Tensors) -> None:
        groups = site.conv.groups if site.conv else 1
        known = site.kind in kinds and site.within is None
        if known and (transposed or not site.transposed) and (grouped or groups == 1):
            if not padded:
                warn_of_padding(peft_type, site)
            return
        what = "GPT-2's Conv1D" if site.transposed else f"{site.kind} of {groups} groups" if groups > 1 else site.kind
        what = what if site.within is None else f"a weight within '{site.within}'"
        raise SiteError(
            f"PEFT's {peft_type} does not adapt '{site.path}', which is {what}",
            next_step="use format='native', or exclude= the module",
            code="site_unsupported",
        )

    return check


def warn_of_padding(peft_type: str, site: Site) -> None:
    """Warn of a convolution that pads otherwise than with zeros: PEFT pads what it runs beside it with zeros.

    Merged by PEFT the adapter is what it is here; unmerged, PEFT computes something else at the borders.
    """
    if site.conv is None or not site.conv.before or site.conv.mode == "zeros":
        return
    warn(
        f"'{site.path}' pads by '{site.conv.mode}', where PEFT's {peft_type} pads with zeros until it is merged: "
        "what is computed here is the merged weight's, everywhere",
        next_step="exclude= the module where its borders must be those of PEFT's unmerged adapter",
    )


def core_shape(site: Site, core: torch.Tensor) -> tuple[int, ...]:
    """The file's shape (r, r, kh, kw) of a core (r, r, taps); a Conv1d's kernel counts as (k, 1)."""
    assert site.conv is not None
    return (*core.shape[:2], *(*site.conv.kernel, 1)[:2])


def mismatched_shapes(path: str, stored: Tensors, expected: str) -> AdapterError:
    """The error for tensors of one site that make no adapter of it."""
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in stored.items())
    return AdapterError(
        f"the tensors at '{path}' do not belong together: {shapes}", next_step=expected, code="shape_mismatch"
    )
