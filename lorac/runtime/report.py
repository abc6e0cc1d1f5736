"""What a swap did and cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SwapReport:
    """The cost of one swap.

    Attributes:
        state: weight state afterwards: ``"bound"`` (weights are inputs) or ``"settled"`` (re-baked, prepacked).
        sites: sites whose slots changed.
        bytes: bytes written or bound anew.
        seconds: wall time of the whole swap.
        blocked_seconds: how long calls were held; 0 in live mode.
    """

    state: str
    sites: int
    bytes: int
    seconds: float
    blocked_seconds: float = 0.0
