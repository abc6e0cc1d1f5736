"""Magnitude pruning: the weighted sum of each change's largest entries."""

from dataclasses import dataclass

from lorac.merging.way import LargestEntriesWay, PrunedSumWay


@dataclass(frozen=True, kw_only=True)
class MagnitudePrune(LargestEntriesWay, PrunedSumWay):
    """The sum of the largest entries."""

    name = "magnitude_prune"
    paper = "PEFT's add_weighted_adapter"
