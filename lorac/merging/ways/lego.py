"""LoRAs split into single ranks, and combined from clusters of similar ranks."""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from lorac.argument_types import Count, OneOf
from lorac.errors import ChoiceError
from lorac.ir.algebra.changes import Change, LowRank
from lorac.merging.clustering import average, cluster, sort_points
from lorac.merging.spaces import sum_changes, weighted_sum
from lorac.merging.terms import ScaledPair, SiteTerms
from lorac.merging.way import SiteWay

_NORMS = {"inf": math.inf, "l2": 2.0}


class Lego(SiteWay):
    """Clusters of the adapters' ranks, each a row of A with a column of B; a cluster's mean is a rank of the result.

    A mean is scaled to the mean norm of its cluster, and the result by √(r/k), where r is the largest rank of the
    adapters and k is the result's rank, ``rank`` or r. The result resembles a mean of the adapters, not their sum: the
    weights are those of the ranks in the clusters, and equal weights change nothing.

    Attributes:
        feature: ranks are compared by their entries (``raw``), or by their directions (``normalized``).
        norm: the norm of the scaling: the largest entry (``inf``) or the length (``l2``).
        reweight_output: whether to scale the result by √(r/k).
        canonicalize_sign: whether to flip the signs of a rank so that the largest entry of its row is positive.
        balance: whether to give the row and the column of a rank equal length before ranks are compared.
        n_init: the number of sets of initial centres.
        max_iter: the largest number of steps from each set.
    """

    feature: Annotated[str, OneOf(("raw", "normalized"))] = "raw"
    norm: Annotated[str, OneOf(tuple(_NORMS))] = "inf"
    reweight_output: bool = True
    canonicalize_sign: bool = False
    balance: bool = False
    n_init: Count = 10
    max_iter: Count = 300

    name = "lego"
    reads = "factors"
    paper = (
        "Merging LoRAs like Playing LEGO: Pushing the Modularity of LoRA to Extremes Through Rank-Wise Clustering, "
        "arXiv 2409.16167"
    )

    def result_rank(self, terms: SiteTerms) -> int | None:
        return None  # the number of clusters is the rank

    def merge_site(self, terms: SiteTerms) -> Change:
        pairs = zip(terms.scaled_pairs(), terms.weights, strict=True)
        present = [(pair, weight) for pair, weight in pairs if pair is not None]
        joined = self._join([pair for pair, _ in present], [weight for _, weight in present], terms.generator)
        shift = None if terms.shifts is None else weighted_sum(terms.shifts, _shares(terms.weights))
        return LowRank(joined.a.mT, joined.scale * joined.b.mT, e=shift)

    def merge_replaced(self, terms: SiteTerms) -> Change:
        return sum_changes(_shares(terms.weights), terms)

    def _join(self, pairs: Sequence[ScaledPair], weights: Sequence[float], generator: torch.Generator) -> ScaledPair:
        """Combine the pairs of the adapters that change a site, of any ranks, with their weights, into one pair."""
        if min(weights) <= 0:
            raise ChoiceError(
                f"a weight is {min(weights):g}, and method 'lego' takes shares of clusters",
                next_step="give weights above 0, or leave the adapter out",
            )
        if pairs[0].b.dim() > 2:
            matrices = [[ScaledPair(b, a, p.scale) for b, a in zip(p.b, p.a, strict=True)] for p in pairs]
            joined = [self._join(slices, weights, generator) for slices in zip(*matrices, strict=True)]
            return ScaledPair(torch.stack([one.b for one in joined]), torch.stack([one.a for one in joined]))
        units = torch.cat([self._units(pair) for pair in pairs]).double()
        shares = torch.cat([units.new_full((pair.a.shape[0],), w) for pair, w in zip(pairs, weights, strict=True)])
        largest = max(pair.a.shape[0] for pair in pairs)
        order = sort_points(units)
        units, shares, k = units[order], shares[order], min(self.rank or largest, len(units))
        points = units / _length(units) if self.feature == "normalized" else units
        labels = cluster(points, shares, k, generator, self.n_init, self.max_iter)
        means = average(units, shares, labels, k)
        sizes, norms = (torch.linalg.vector_norm(t, ord=_NORMS[self.norm], dim=1, keepdim=True) for t in (units, means))
        scales = average(sizes, shares, labels, k) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        is_zero = torch.linalg.vector_norm(means, dim=1, keepdim=True) < 1e-12
        ranks = torch.where(is_zero, means, means * scales).to(pairs[0].a.dtype)
        factor = math.sqrt(largest / len(ranks)) if self.reweight_output else 1.0
        width = pairs[0].a.shape[1]
        return ScaledPair(factor * ranks[:, width:].mT, ranks[:, :width])

    def _units(self, pair: ScaledPair) -> Tensor:
        """Return each rank as its row and column (r, in + out), each multiplied by √scale."""
        root = math.sqrt(abs(pair.scale))
        rows, columns = root * pair.a, math.copysign(root, pair.scale) * pair.b.mT
        if self.balance:
            ratio = _length(columns) / _length(rows)
            rows, columns = rows * ratio.sqrt(), columns / ratio.sqrt()
        if self.canonicalize_sign:
            signs = rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
            rows, columns = rows * signs, columns * signs
        return torch.cat([rows, columns], 1)


def _shares(weights: Sequence[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


def _length(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)
