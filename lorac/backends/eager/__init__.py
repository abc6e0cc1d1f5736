"""Eager PyTorch: the host module itself, each site's call computed from the site's slots."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lorac.backends.eager.artifact import base_file, relowered, restore, store
from lorac.backends.eager.engine import EagerEngine
from lorac.ir.engine import BuildRequest
from lorac.ir.host.copying import structural_copy
from lorac.ir.slots.emits import refuse_unemitted

__all__ = ["EagerEngine", "Options", "base_file", "build", "host_for", "relowered", "restore", "store"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the eager target.

    Attributes:
        aux: extra outputs to keep, such as ``("router",)``; read them from ``compiled.aux``.
    """

    aux: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "aux", tuple(self.aux))


def host_for(model: nn.Module) -> nn.Module:
    """The model itself: eager computes in any dtype."""
    return model


def build(request: BuildRequest) -> EagerEngine:
    """An engine over a structural copy of the host."""
    refuse_unemitted(request.options.aux, request.plans.values())
    engine = EagerEngine(
        structural_copy(request.model),
        request.plans,
        request.base,
        sites=request.sites,
        fused=request.mode != "live",
        terms=request.terms,
        aux=request.options.aux,
    )
    if request.mode == "baked":
        engine.write(request.snapshot)
    return engine
