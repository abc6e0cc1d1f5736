"""The report of a swap."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SwapReport:
    """The cost of one swap.

    Attributes:
        state: weight state afterwards: ``"bound"`` (weights are inputs) or ``"settled"`` (weights are constants again).
        sites: number of sites whose slots changed.
        bytes: bytes that were written or newly bound.
        seconds: wall time of the whole swap.
        blocked_seconds: how long calls had to wait; 0 in live mode.
    """

    state: str
    sites: int
    bytes: int
    seconds: float
    blocked_seconds: float = 0.0
