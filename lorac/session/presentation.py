"""How a compiled model presents itself: its summary, and the names that it offers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lorac.errors import EagerOnly, UnknownAttribute, escape_controls, nearest_name
from lorac.ir.slots.choice import describe_choice
from lorac.report.terms import describe_variant
from lorac.runtime.switchable_model import SwitchableModel
from lorac.session.other_vocabularies import LORAC_STEPS
from lorac.variants.adapter import Adapter

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
"""The public attributes of a compiled model on every target."""
_LISTED_ADAPTERS = 4
"""Number of adapters that a summary names."""


def describe_compiled(model: SwitchableModel, site_count: int) -> str:
    """Return a summary of a few lines: target, mode, sites, adapters, and the active choice."""
    touched = sum(not plan.empty for plan in model.plans.values())
    lines = (
        f"<{type(model).__name__} for {model.engine.target}, {model.mode}",
        f"  sites: {touched} with slots, of {site_count}",
        f"  adapters: {_describe_adapters(model.adapters)}",
        f"  active: {describe_choice(model.choice)}>",
    )
    return escape_controls("\n".join(lines))


def _describe_adapters(adapters: Mapping[str, Adapter]) -> str:
    listed = [f"{name} ({describe_variant(adapter.variant)})" for name, adapter in adapters.items()]
    more = len(listed) - _LISTED_ADAPTERS
    return ", ".join([*listed[:_LISTED_ADAPTERS], *([f"{more} more"] if more > 0 else [])]) or "none"


def unknown_attribute(compiled: object, name: str) -> AttributeError:
    """Return the error for an attribute that a compiled model does not have."""
    cls = type(compiled).__name__
    if name in LORAC_STEPS:
        return UnknownAttribute(f"a {cls} has no '{name}'", next_step=LORAC_STEPS[name])
    if not name.startswith("_") and hasattr(nn.Module, name):
        return EagerOnly(
            f"a {cls} has no '{name}': it is not an nn.Module",
            next_step="compile with target='eager' to train or move it",
        )
    return UnknownAttribute(
        f"a {cls} has no '{name}'",
        nearest=nearest_name(name, INTERFACE, alike=0.6),
        next_step="dir(compiled) lists its attributes",
    )
