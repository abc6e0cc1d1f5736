"""What VERA, RANDLORA and VBLORA have in common: they adapt linear layers, which share random or trained tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lorac.errors import BaseNeeded
from lorac.formats.peft import config
from lorac.formats.peft.fields import PLACES, only
from lorac.formats.peft.peft_type import Field, FieldUse, Tensors
from lorac.ir.sites import Site, SiteKind
from lorac.variants.base import Variant


def linear(peft_type: str) -> Callable[[Site, Tensors], None]:
    """The check that a site is an nn.Linear or GPT-2's Conv1D."""
    return only(peft_type, {SiteKind.LINEAR}, transposed=True)


def seed(value: Any) -> int:
    """A whole number."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("expected a whole number")
    return value


def whole(peft_type: str) -> Callable[[Variant, Site, Tensors], dict[str, Tensor]]:
    """A writer of one site's tensors by suffix, those that all sites share among them.

    Its function raises ``SiteError`` where PEFT's type adapts no linear layer.
    """
    check_site = linear(peft_type)

    def write_site(variant: Variant, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        check_site(site, tensors)
        return dict(tensors)

    return write_site


LAYERS = {name: field for name, field in PLACES.items() if name != "exclude_modules"}
"""Fields that narrow target_modules, of types that have no exclude_modules."""

SEEDED = {
    "projection_prng_key": Field(FieldUse.APPLIED, 0, to="projection_prng_key", read=seed),
    # Without, the file leaves out what the seed tells; lorac always writes it.
    "save_projection": Field(FieldUse.APPLIED, True, read=config.flag),
    "init_weights": Field(FieldUse.TRAINING, True),
}
"""Fields of types whose shared tensors are drawn from a seed."""


def largest(values: Mapping[str, Any], sites: Sequence[Site]) -> tuple[int, int] | None:
    """The largest out and the largest in of the sites; None where the file promises what the seed tells.

    Raises:
        BaseNeeded: No site is known, so the size of what the file leaves out is not either.
    """
    if values["save_projection"]:
        return None
    if not sites:
        raise BaseNeeded(
            "save_projection=False: the file leaves out what its seed tells, and the model tells how large that is",
            next_step="load_adapter(path, model)",
        )
    return max(site.out_features for site in sites), max(site.in_features for site in sites)
