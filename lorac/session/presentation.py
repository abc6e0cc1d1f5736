"""What a compiled model says of itself: what a swap did and cost, what it is, and what can be asked of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from torch import nn

from lorac.errors import EagerOnly, nearest_name
from lorac.ir.slots.choice import describe_choice
from lorac.report.terms import describe_variant

ClassType = TypeVar("ClassType")

INTERFACE = (
    "active",
    "adapters",
    "add_adapter",
    "aux",
    "explain",
    "export",
    "generate",
    "graph",
    "mode",
    "remove_adapter",
    "save",
    "save_choice",
    "swap",
    "tokenizer",
)
"""What there is to ask of a compiled model, on every target; all else is its business."""
_LISTED_ADAPTERS = 4
"""Adapters that a line names."""


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


def add_presentation(cls: type[ClassType]) -> type[ClassType]:
    """A class of compiled models, which say what they are and what there is to ask of them."""

    def listed(compiled: Any) -> list[str]:
        return list(INTERFACE)

    def missing(compiled: Any, name: str) -> NoReturn:
        raise unknown_attribute(compiled, name)

    for name, method in {"__repr__": describe_compiled, "__dir__": listed, "__getattr__": missing}.items():
        setattr(cls, name, method)
    return cls


def describe_compiled(compiled: Any) -> str:
    """A compiled model in a few lines: target, mode, sites, adapters, and which are active."""
    touched = sum(not plan.empty for plan in compiled.plans.values())
    return "\n".join(
        (
            f"<{type(compiled).__name__} for {compiled.engine.target}, {compiled.mode}",
            f"  sites: {touched} with slots, of {len(compiled.sites)}",
            f"  adapters: {_describe_adapters(compiled.adapters)}",
            f"  active: {describe_choice(compiled.choice)}>",
        )
    )


def _describe_adapters(adapters: Mapping[str, Any]) -> str:
    told = [
        f"{name} ({describe_variant(adapter.variant)})" for name, adapter in list(adapters.items())[:_LISTED_ADAPTERS]
    ]
    more = len(adapters) - len(told)
    return ", ".join([*told, *([f"{more} more"] if more else [])]) or "none"


def unknown_attribute(compiled: object, name: str) -> AttributeError:
    """The error for an attribute that a compiled model does not have."""
    cls = type(compiled).__name__
    if not name.startswith("_") and hasattr(nn.Module, name):
        return EagerOnly(
            f"a {cls} has no '{name}': it is no nn.Module", next_step="compile with target='eager' to train or move it"
        )
    near = nearest_name(name, INTERFACE, alike=0.6)
    return AttributeError(f"a {cls} has no '{name}'" + (f"\n  nearest: {near}" if near else ""))
