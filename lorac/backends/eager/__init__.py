"""Eager PyTorch: the host module itself, each site's call computed from the site's slots."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lorac.backends.eager.engine import EagerEngine
from lorac.ir.copying import structural_copy
from lorac.ir.engine import BuildRequest

__all__ = ["EagerEngine", "Options", "build", "host_for"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the eager target: none."""


def host_for(model: nn.Module) -> nn.Module:
    """The model itself: eager computes in any dtype."""
    return model


def build(request: BuildRequest) -> EagerEngine:
    """An engine over a structural copy of the host."""
    engine = EagerEngine(
        structural_copy(request.model),
        request.plans,
        request.base,
        fused=request.mode != "live",
        terms=request.terms,
    )
    if request.mode == "baked":
        engine.write(request.snapshot)
    return engine
