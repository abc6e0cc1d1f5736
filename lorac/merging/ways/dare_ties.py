"""DARE: drop entries at random and rescale the others, then elect a sign."""

from dataclasses import dataclass

from lorac.merging.way import SignElectionWay
from lorac.merging.ways.dare_linear import RandomPruningWay


@dataclass(frozen=True, kw_only=True)
class DareTies(RandomPruningWay, SignElectionWay):
    """The sum of random entries with the elected sign, scaled up to the whole's size; the paper's p is 1 − density."""

    name = "dare_ties"
