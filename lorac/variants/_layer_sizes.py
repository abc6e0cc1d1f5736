"""Errors for layers whose sizes do not fit a hyper-parameter."""

import math

from lorac.errors import SiteError
from lorac.variants.base import Site


def require_divisor(site: Site, field: str, size: int, *, outputs: bool = False) -> None:
    """Raise ``SiteError`` if a hyper-parameter does not divide a layer's inputs and outputs, or only its outputs."""
    common = site.out_features if outputs else math.gcd(site.in_features, site.out_features)
    if common % size:
        sides = "the outputs" if outputs else "both sides"
        raise SiteError(
            f"{field}={size} does not divide {sides} of '{site.path}', {site.in_features} -> {site.out_features}",
            nearest=f"{field}={max(d for d in range(1, min(size, common) + 1) if common % d == 0)}",
            next_step=f"give another {field}, or exclude= the module",
        )


def require_at_most(site: Site, field: str, size: int, most: int) -> None:
    """Raise ``SiteError`` if a hyper-parameter is larger than a layer admits."""
    if size > most:
        raise SiteError(
            f"'{site.path}', {site.in_features} -> {site.out_features}, takes {field} up to {most}, not {size}",
            nearest=f"{field}={most}",
            next_step=f"give a smaller {field}, or exclude= the module",
        )
