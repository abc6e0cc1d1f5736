"""TLoRA: a full-rank transform of the layer's input in tensor form, plus a low-rank or tensor-ring residual.

Tao et al. 2025, arXiv 2501.08727; names, scale and index order as in the authors' code (taozerui/tlora_diffusion).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch

from lorac.argument_types import Bounds, Count, OneOf
from lorac.errors import SiteError
from lorac.variants.base import Init, InitContext, Params, ParamSpec, Site, SiteKind, Tensor, WeightVariant
from lorac.variants.initialisers import normal, zeros

_DIMS = ((4, 8, 10), (8, 8, 10), (8, 8, 12), (8, 10, 16), (8, 16, 16))
"""The factorisations in the authors' code."""


def _identity(context: InitContext) -> Tensor:
    """Return I, or I/R for every pair of ring indices, so that the trace over the ring is I (in float64 for 1/3)."""
    size, _, *ring = context.shape
    eye = torch.eye(size, dtype=torch.float64)
    return eye if not ring else (eye / ring[0])[:, :, None, None].expand(context.shape).clone()


@dataclass(frozen=True, kw_only=True)
class TLoRA(WeightVariant):
    """``W' = W·T + s·Δ``, s = alpha/√r or alpha/r.

    ``T[j, k] = tr(A¹[j₁, k₁] ⋯ Aᴰ[j_D, k_D])``, a tensor-ring matrix, A^d (i_d, i_d, R, R), or the Kronecker product of
    A^d (i_d, i_d) for R = 1. Δ is ``B·A``, or ``Δ[a, j] = tr(B¹[a₁] ⋯ Bᴰ[a_D]·C¹[j₁] ⋯ Cᴰ[j_D])``, a tensor ring.

    Attributes:
        transform_rank: R; 0 for no transform.
        r: rank of the residual, R' for a ring.
        residual: ``"lora"`` or ``"ttv"`` (the ring).
        alpha, rslora: s = alpha/√r under rslora, the code's default; s = 1 in the paper.
        index_order: ``"big"``: the first factor is the slowest index (the code); ``"little"``: the fastest (the paper).
        dims: factorisations, each for the size that it multiplies to. Other sizes use the authors' table, or else the
            most balanced three factors.
    """

    transform_rank: Annotated[int, Bounds(0)] = 1
    r: Count = 1
    residual: Annotated[str, OneOf(("lora", "ttv"))] = "lora"
    alpha: float = 1
    rslora: bool = True
    index_order: Annotated[str, OneOf(("big", "little"))] = "big"
    dims: tuple[tuple[int, ...], ...] = ()

    name = "tlora"
    paper = (
        "Transformed Low-rank Adaptation via Tensor Decomposition and Its Applications to Text-to-image Models, "
        "arXiv 2501.08727"
    )
    kinds = frozenset({SiteKind.LINEAR})

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "dims", tuple(tuple(factors) for factors in self.dims))

    @property
    def scale(self) -> float:
        """The factor s of the residual."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def factors(self, size: int) -> tuple[int, ...]:
        """Return the factorisation of one side of a layer."""
        for known in (*self.dims, *_DIMS):
            if math.prod(known) == size:
                return known
        firsts = [d for d in range(1, size + 1) if size % d == 0]
        triples = ((a, b, size // a // b) for a in firsts for b in firsts if a <= b and size // a % b == 0)
        return min((t for t in triples if t[1] <= t[2]), key=sum)

    def check(self, site: Site) -> None:
        super().check(site)
        rows, columns = self.factors(site.out_features), self.factors(site.in_features)
        if self.residual == "ttv" and len(rows) != len(columns):
            raise SiteError(
                f"TLoRA's ring needs as many factors of the outputs {rows} as of the inputs {columns} at '{site.path}'",
                next_step="give dims= factorisations of equal length",
            )

    def params(self, site: Site) -> dict[str, ParamSpec]:
        rows, columns = self.factors(site.out_features), self.factors(site.in_features)
        specs = {}
        if self.transform_rank > 0:
            ring = () if self.transform_rank == 1 else (self.transform_rank,) * 2
            for d, size in enumerate(columns):
                specs[f"transform_core_{d}"] = ParamSpec((size, size, *ring), _identity)
        if self.residual == "lora":
            kaiming_normal = normal((3 * site.in_features) ** -0.5)  # with a = √5
            specs["lora_A"] = ParamSpec((self.r, site.in_features), kaiming_normal)
            specs["lora_B"] = ParamSpec((site.out_features, self.r), zeros)
            return specs
        for d, size in enumerate((*rows, *columns)):
            init: Init = normal(size**-0.5)
            if d < len(rows):
                init = normal(math.sqrt(size) / self.r**2) if d else zeros
            specs[f"ttv_core_{d}"] = ParamSpec((size, self.r, self.r), init)
        return specs

    def weight(self, W: Tensor, p: Params) -> Tensor:
        cores = self._ordered(_cores(p, "transform_core_"))
        transformed = _times_ring(W, cores) if cores else W
        if self.residual == "lora":
            return transformed + self.scale * (p.lora_B @ p.lora_A)
        ring = _cores(p, "ttv_core_")
        half = len(ring) // 2
        # tr(L·R) = Σ L[p, q]·R[q, p]: a matrix product over pairs of ring indices.
        totals = []  # G¹[a₁] ⋯ Gᴰ[a_D] for every index a of a half: (n, R, R)
        for first, *cores in (ring[:half], ring[half:]):
            total = first
            for core in cores:
                grid = torch.einsum("apq,bqr->abpr", total, core)
                ordered = grid if self.index_order == "big" else grid.transpose(0, 1)
                total = ordered.reshape(-1, *core.shape[1:])
            totals.append(total)
        left, right = totals
        return transformed + (self.scale * left.flatten(1)) @ right.transpose(1, 2).flatten(1).t()

    def _ordered(self, cores: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the cores, each (n, n, R, R), from the slowest index to the fastest.

        The trace of a product in reverse order equals the trace of the transposed factors in order.
        """
        rings = [core if core.dim() > 2 else core[:, :, None, None] for core in cores]
        return rings if self.index_order == "big" else [core.transpose(2, 3) for core in reversed(rings)]


def _cores(p: Params, prefix: str) -> list[Tensor]:
    names = itertools.takewhile(lambda name: hasattr(p, name), (f"{prefix}{d}" for d in itertools.count()))
    return [getattr(p, name) for name in names]


def _times_ring(W: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """Return W (out, in)·T, core by core, without materialising T."""
    out, columns = W.shape
    ring = cores[0].shape[2]
    # (out·done, rest, first ring index, current ring index); the current index starts equal to the first.
    state = torch.einsum("nj,pq->njpq", W, torch.eye(ring, dtype=W.dtype, device=W.device))
    for core in cores:
        done, rest, size = state.shape[0], state.shape[1], core.shape[0]
        split = state.reshape(done, size, rest // size, ring, ring)
        state = torch.einsum("njmpq,jkqr->nkmpr", split, core).reshape(done * size, rest // size, ring, ring)
    return torch.einsum("nmpp->nm", state).reshape(out, columns)
