"""Sizes of blocks that have to divide both sides of a layer."""

import math

from lorac.errors import SiteError
from lorac.variants.base import Site


def require_divisor(site: Site, field: str, size: int) -> None:
    """Raise ``SiteError`` where a field's size does not divide both sides of a layer."""
    common = math.gcd(site.in_features, site.out_features)
    if common % size:
        raise SiteError(
            f"{field}={size} does not divide both sides of '{site.path}', {site.in_features} -> {site.out_features}",
            nearest=f"{field}={max(d for d in range(1, min(size, common) + 1) if common % d == 0)}",
            next_step=f"give a {field}= that divides both, or exclude= the module",
        )
