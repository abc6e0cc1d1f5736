"""TIES: trim, elect a sign, and average what has it."""

from dataclasses import dataclass

from lorac.merging.way import LargestEntriesWay, SignElectionWay


@dataclass(frozen=True, kw_only=True)
class Ties(LargestEntriesWay, SignElectionWay):
    """The mean of the largest entries that have the elected sign."""

    name = "ties"
    paper = "TIES-Merging: Resolving Interference When Merging Models, arXiv 2306.01708"
    normalizes = True
