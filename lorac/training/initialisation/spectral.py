"""Initialisers that read only the weight: its first or last components, or its QR decomposition.

PiSSA: Meng et al. 2024, arXiv 2404.02948; MiLoRA: Wang et al. 2024, arXiv 2406.09044; OLoRA: Büyükakyüz 2024,
arXiv 2406.01775.
"""

from dataclasses import dataclass

import torch

from lorac.adapters.residual_base import FactorPair, balance_factors, olora_factors, pissa_factors
from lorac.errors import OptionError
from lorac.training.initialisation.initialiser import InitialisationSite, PairInitialiser


@dataclass(frozen=True, kw_only=True)
class PiSSA(PairInitialiser):
    """B = U_r·√(Σ_r/s), A = √(Σ_r/s)·V_rᵀ of the first r components of W = U·Σ·Vᵀ; the base keeps the others.

    Attributes:
        rounds: None for the exact decomposition; else the number of subspace iterations of a randomised one (PEFT's
            ``pissa_niter_N``), far cheaper for large weights, from a fixed seed.

    Raises:
        OptionError: ``rounds`` is below 0.
    """

    rounds: int | None = None

    def __post_init__(self) -> None:
        if self.rounds is not None and self.rounds < 0:
            raise OptionError(f"rounds={self.rounds} is not a number of iterations", next_step="give 4, or None: exact")

    def pair(self, place: InitialisationSite) -> FactorPair:
        if self.rounds is None:
            return pissa_factors(place.weight, place.variant.r, place.variant.scale)
        with torch.random.fork_rng(devices=[place.weight.device] if place.weight.is_cuda else []):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(place.weight, q=place.variant.r, niter=self.rounds)
        return balance_factors(u, s, v.mT, place.variant.scale)


@dataclass(frozen=True, kw_only=True)
class MiLoRA(PairInitialiser):
    """PiSSA with the last r components of W instead of the first."""

    def pair(self, place: InitialisationSite) -> FactorPair:
        u, s, vh = torch.linalg.svd(place.weight, full_matrices=False)
        r = place.variant.r
        return balance_factors(u[..., -r:], s[..., -r:], vh[..., -r:, :], place.variant.scale)


@dataclass(frozen=True, kw_only=True)
class OLoRA(PairInitialiser):
    """B = Q_r, orthonormal, and A = R_r of W = Q·R; the base keeps W − s·Q_r·R_r."""

    def pair(self, place: InitialisationSite) -> FactorPair:
        return olora_factors(place.weight, place.variant.r, place.variant.scale)
