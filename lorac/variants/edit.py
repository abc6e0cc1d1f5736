"""Edit: the change of a weight in its normal form, whatever method made it.

Merged and extracted adapters, which no method's formula describes, are stored as Edits (``lorac.adapters.edits``).
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch

from lorac.argument_types import Count
from lorac.errors import OptionError, SiteError, nearest_name
from lorac.variants._masks import NAMED_MASKS
from lorac.variants.base import MATRIX_KINDS, Init, Params, ParamSpec, Role, Site, SiteKind, Tensor, WeightVariant
from lorac.variants.initialisers import kaiming_uniform, ones, zeros


def _spec(init: Init, shape: Callable[[Site, int], tuple[int, ...]]) -> Callable[[Site, int], ParamSpec]:
    return lambda site, size: ParamSpec(shape(site, size), init)


def _positions(site: Site, size: int) -> ParamSpec:
    below = (site.out_features, site.in_features)
    return ParamSpec((2, size), NAMED_MASKS["random"].make, Role.INDEX, below=below)


PARTS: Mapping[str, Mapping[str, Callable[[Site, int], ParamSpec]]] = {
    "pair": {
        "a": _spec(kaiming_uniform, lambda site, size: (site.in_features, size)),
        "b": _spec(zeros, lambda site, size: (size, site.out_features)),
    },
    "c": {"c": _spec(ones, lambda site, size: (site.out_features,))},
    "d": {"d": _spec(ones, lambda site, size: (site.in_features,))},
    "t": {
        "t": _spec(
            lambda context: torch.eye(context.shape[-1]).repeat(context.shape[0], 1, 1),
            lambda site, size: (site.in_features // size, size, size),
        )
    },
    "e": {"e": _spec(zeros, lambda site, size: (site.out_features,))},
    "sparse": {"indices": _positions, "values": _spec(zeros, lambda site, size: (size,))},
    "delta": {"delta": _spec(zeros, lambda site, size: (site.out_features, site.in_features))},
}
"""Part -> its tensors at a site: operands of ``lorac.ir.algebra.operands``, or positions and values of a sparse
change."""
_STACKED = frozenset({"pair", "delta"})
"""The parts that a stack of matrices may have."""


@dataclass(frozen=True, kw_only=True)
class Edit(WeightVariant):
    """``W' = c∘W·Tᵀ∘d + (A·B)ᵀ + S + D`` and ``b' = b + e``; each site has only the parts that it needs.

    A (in, R), B (R, out), D (out, in), T block-diagonal; S has values at fixed positions.

    Attributes:
        parts: part -> its size: ``"pair"`` (A and B) -> R, ``"t"`` -> size of the blocks, ``"sparse"`` (S) -> number of
            values; ``"c"``, ``"d"``, ``"e"``, ``"delta"`` (D) -> 1. By default D alone.
        by_site: module path -> parts of this module.
    """

    parts: Mapping[str, Count] = field(default_factory=lambda: {"delta": 1})
    by_site: Mapping[str, Mapping[str, Count]] = field(default_factory=dict)

    name = "edit"
    paper = "any method, in its normal form"
    kinds: ClassVar[frozenset[SiteKind]] = MATRIX_KINDS | {SiteKind.MATRIX}

    def __post_init__(self) -> None:
        super().__post_init__()
        for part, size in (item for parts in (self.parts, *self.by_site.values()) for item in parts.items()):
            if part not in PARTS or size < 1:
                raise OptionError(
                    f"an edit has no part '{part}' of size {size}",
                    nearest=nearest_name(part, PARTS),
                    next_step=f"give {', '.join(PARTS)} sizes above 0",
                )

    def at_path(self, path: str) -> Self:
        own = self.by_site.get(path, self.parts)
        return dataclasses.replace(self, parts=own, by_site={}) if self.by_site else self

    def check(self, site: Site) -> None:
        super().check(site)
        parts = self.at_path(site.path).parts
        if site.stack and not parts.keys() <= _STACKED:
            raise SiteError(
                f"an edit of the stack of matrices '{site.path}' has the parts {' and '.join(sorted(_STACKED))}, not "
                f"{', '.join(sorted(parts.keys() - _STACKED))}",
                next_step="give by_site= the part 'delta' there, which holds every change",
            )
        size = parts.get("t", 1)
        if site.in_features % size:
            raise SiteError(
                f"blocks of size {size} do not divide the {site.in_features} inputs of '{site.path}'",
                next_step="give parts= a size of 't' that divides them",
            )

    def params(self, site: Site) -> dict[str, ParamSpec]:
        parts = self.at_path(site.path).parts
        return {name: make(site, size) for part, size in parts.items() for name, make in PARTS[part].items()}

    def weight(self, W: Tensor, p: Params) -> Tensor:
        if "t" in vars(p):
            W = W @ torch.block_diag(*p.t.transpose(1, 2).unbind())
        if "d" in vars(p):
            W = W * p.d
        if "c" in vars(p):
            W = p.c[:, None] * W
        if "a" in vars(p):
            W = W + p.b.t() @ p.a.t()
        if "values" in vars(p):
            W = torch.index_put(W, (p.indices[0], p.indices[1]), p.values, accumulate=True)
        return W + p.delta if "delta" in vars(p) else W

    def new_bias(self, b: Tensor, p: Params) -> Tensor:
        return b + p.e if "e" in vars(p) else b
