"""DELLA: drop entries at random, small ones sooner, then elect a sign."""

from dataclasses import dataclass

from lorac.merging.way import SignElectionWay
from lorac.merging.ways.della_linear import RankPruningWay


@dataclass(frozen=True, kw_only=True)
class Della(RankPruningWay, SignElectionWay):
    """The sum of entries that are drawn by their rank in the row, and have the elected sign."""

    name = "della"
    normalizes = True
