"""Model Breadcrumbs: leave the smallest entries and the outliers out, then elect a sign."""

from dataclasses import dataclass

from lorac.merging.way import SignElectionWay
from lorac.merging.ways.breadcrumbs import OutlierPruningWay


@dataclass(frozen=True, kw_only=True)
class BreadcrumbsTies(OutlierPruningWay, SignElectionWay):
    """The sum of entries that have the elected sign, without the smallest and the very largest."""

    name = "breadcrumbs_ties"
