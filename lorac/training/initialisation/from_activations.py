"""Initialisers that read the layers' inputs: CorDA and EVA.

CorDA: Yang et al. 2024, arXiv 2406.05223; EVA: Paischer et al. 2024, arXiv 2410.07170.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorac.adapters.lora_conversion import make_lora_variant
from lorac.adapters.residual_base import FactorPair, balance_factors
from lorac.errors import OptionError, not_one_of
from lorac.ir.sites.site import Site, factor_dtype
from lorac.training.initialisation.activations import batches_error, visit_inputs
from lorac.training.initialisation.initialiser import Batches, InitialisationSite, Initialiser, PairInitialiser
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant
from lorac.variants.lora import LoRA

_MODES = ("ipm", "kpm")
_DAMP, _INEXACT = 0.01, 0.05
"""CorDA's first share of the mean variance that is added to the covariance, and how far C·C⁻¹ may be from I."""


@dataclass(frozen=True, kw_only=True)
class CorDA(PairInitialiser):
    """A and B from W·C = U·Σ·Vᵀ, with C = XᵀX of the inputs: B = U·√(Σ/s), A = √(Σ/s)·Vᵀ·C⁻¹.

    The base keeps W − s·B·A. As in PEFT, XᵀX is a mean over calls, and a call's rows are divided by its largest entry;
    this scale decides how large B is next to A.

    Attributes:
        mode: PEFT's corda_method: ``"ipm"`` trains the first r components, with data of the task to learn;
            ``"kpm"`` the last r, with data of the knowledge to preserve.

    Raises:
        OptionError: there is no such mode.
    """

    mode: str = "ipm"

    reads: ClassVar[str] = "activations"

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise not_one_of("there is no mode", self.mode, _MODES)

    def read(self, model: nn.Module, sites: Mapping[str, Site], batches: Batches) -> Mapping[str, Tensor]:
        sums: dict[str, Tensor] = {}
        calls = Counter[str]()

        def visit(path: str, rows: Tensor) -> None:
            rows = rows / (rows.max().abs() or 1)
            found = rows.t() @ rows
            sums[path] = sums[path] + found if path in sums else found
            calls[path] += 1

        visit_inputs(model, sites, batches, visit, labelled=False)
        return {path: total / calls[path] for path, total in sums.items()}

    def pair(self, place: InitialisationSite) -> FactorPair:
        """Return A and B from XᵀX (in, in), damped on its diagonal until it has an inverse."""
        covariance = place.read.to(place.weight.dtype)
        identity = torch.eye(len(covariance)).to(covariance)
        damp = _DAMP
        while True:
            damped = covariance + damp * covariance.diagonal().mean() * identity
            inverse, failed = torch.linalg.inv_ex(damped)
            if not failed and torch.dist(damped @ inverse, identity) < _INEXACT:
                break
            if damp > 1e6:
                raise batches_error("the inputs of a layer are all 0", next_step="give other batches")
            damp *= 2
        u, s, vh = torch.linalg.svd(place.weight @ damped, full_matrices=False)
        part = slice(None, place.variant.r) if self.mode == "ipm" else slice(-place.variant.r, None)
        return balance_factors(u[:, part], s[part], (vh @ inverse)[part], place.variant.scale)


@dataclass(frozen=True, kw_only=True)
class EVA(Initialiser):
    """A from the principal components of a layer's inputs, more rank where they explain more; B = 0.

    The sum of the layers' ranks stays. A layer that gets rank 0 is left out. The components are those of all rows
    together; PEFT's come from an incremental decomposition that stops early.

    Attributes:
        rho: a layer gets at most rho·r; 1 leaves the ranks unchanged.
        whiten: divide each component by the root of its singular value.
        adjust_scaling_factors: scale alpha with the rank, so that alpha/r stays.

    Raises:
        OptionError: rho is below 1.
    """

    rho: float = 2.0
    whiten: bool = False
    adjust_scaling_factors: bool = True

    methods: ClassVar[tuple[type[Variant], ...]] = (LoRA,)
    reads: ClassVar[str] = "activations"

    def __post_init__(self) -> None:
        if not self.rho >= 1:
            raise OptionError(f"rho={self.rho} is below 1", next_step="give 1 or more")

    def begin(self, adapter: Adapter, model: nn.Module, sites: Mapping[str, Site], batches: Batches) -> Adapter:
        moments: dict[str, _InputMoments] = {path: _InputMoments() for path in sites}
        visit_inputs(model, sites, batches, lambda path, rows: moments[path].add(rows), labelled=True)
        variants: dict[str, Any] = {path: adapter.variant.at(site) for path, site in sites.items()}
        most = {path: round(variants[path].r * self.rho) for path in sites}
        found = {path: moments[path].components(path, variants[path].r, most[path]) for path in sites}
        ranks = distribute_ranks(
            {path: share for path, (_, _, share) in found.items()}, sum(v.r for v in variants.values())
        )
        tensors = {}
        for path, rank in ranks.items():
            vectors, sizes, _ = found[path]
            a = vectors[:rank] / sizes[:rank, None].sqrt() if self.whiten else vectors[:rank]
            a, b = a.to(factor_dtype(sites[path].dtype)).contiguous(), adapter.tensors[path]["lora_B"]
            tensors[path] = {**adapter.tensors[path], "lora_A": a, "lora_B": b.new_zeros(b.shape[0], rank)}
        scaled = {path: ranks[path] / variants[path].r if self.adjust_scaling_factors else 1 for path in ranks}
        alphas = {path: variants[path].alpha * scaled[path] for path in ranks}
        own: Any = adapter.variant
        variant = make_lora_variant(ranks, alphas, own, rslora=own.rslora, lora_bias=own.lora_bias)
        return replace(adapter, variant=variant, tensors=tensors, provenance={})


class _InputMoments:
    """First and second moments of rows, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.first: Tensor = torch.zeros(())
        self.second: Tensor = torch.zeros(())

    def add(self, rows: Tensor) -> None:
        wide = rows.double()
        self.count += len(wide)
        self.first = self.first + wide.sum(0)
        self.second = self.second + wide.t() @ wide

    def components(self, path: str, least: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return principal components (k, in), singular values (k,), and the share of variance that each explains.

        Raises:
            AdapterError: there are fewer rows than ``least``.
        """
        if self.count < least:
            raise batches_error(
                f"{self.count} positions reach '{path}', fewer than its {least} principal components",
                next_step="give more batches, or a smaller r",
            )
        centred = self.second - torch.outer(self.first, self.first) / self.count
        values, vectors = torch.linalg.eigh(centred)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1).t()
        largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        vectors = (vectors * largest.sign())[:most]
        return vectors, values[:most].sqrt(), values[:most] / values.sum()


def distribute_ranks(shares: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Assign ranks to the ``budget`` components that explain most; ties go to the earlier site."""
    owners = [path for path, share in shares.items() for _ in share]
    order = torch.cat(list(shares.values())).sort(descending=True, stable=True).indices[:budget]
    ranks = dict.fromkeys(shares, 0)
    for index in order.tolist():
        ranks[owners[index]] += 1
    return {path: rank for path, rank in ranks.items() if rank}
