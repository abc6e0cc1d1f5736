"""AdaMSS: low-rank changes of groups of a weight's rows, applied after its right singular vectors.

Zheng et al., NeurIPS 2025; groups, start values and the column of the bias as in PEFT's ADAMSS.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch

from lorac.argument_types import Bounds, Count, Seed
from lorac.variants._decompositions import truncated_svd
from lorac.variants.base import InitContext, Params, ParamSpec, Role, Site, SiteKind, Tensor, WeightVariant
from lorac.variants.initialisers import zeros

_ROUNDS, _SEED, _TOLERANCE = 10, 123456789, 1e-4
"""PEFT's settings of KMeans."""


@dataclass(frozen=True, kw_only=True)
class AdaMSS(WeightVariant):
    """``[W' b'] = [W b] + Σ_k P_k·B_k·A_k·V``: V (R, in + 1) are right singular vectors of [W b], frozen.

    P_k scatters the rows of B_k (size of group k, r_k) to the rows of group k: rows whose left singular vectors are in
    one k-means cluster. A_k is (r_k, R). The B_k are concatenated by rows, in the order of the groups, and V has no
    column for the bias where a layer has none.

    Attributes:
        r: R, at most the number of singular vectors.
        num_subspaces: number of groups.
        subspace_rank: the largest r_k.
        use_dynamic_rank: r_k is the number of singular values of group k whose squares exceed a share of the largest
            value's square.
        svd_threshold: that share.
        random_seed: seed of the randomised singular value decomposition.
    """

    r: Count = 100
    num_subspaces: Count = 5
    subspace_rank: Count = 1
    use_dynamic_rank: bool = False
    svd_threshold: Annotated[float, Bounds(0)] = 0.1
    random_seed: Seed = 0

    name = "adamss"
    paper = "AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning, NeurIPS 2025"
    kinds = frozenset({SiteKind.LINEAR})

    def params(self, site: Site) -> dict[str, ParamSpec]:
        columns, rows = site.in_features + (site.bias is not None), site.out_features
        rank, groups = min(self.r, columns, rows), min(self.num_subspaces, rows)
        return {
            "adamss_newB": ParamSpec((rank, columns), lambda c: self._decompose(c)[1], Role.FROZEN),
            "adamss_groups": ParamSpec((2, rows), self._group, Role.INDEX, below=(groups, rows)),
            "adamss_A": ParamSpec((groups, self.subspace_rank, rank), self._directions),
            "adamss_B": ParamSpec((rows, self.subspace_rank), zeros),
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        up, down = _factors(p)
        return W + up @ down[:, : W.shape[1]]

    def compute_bias(self, W: Tensor, b: Tensor, p: Params) -> Tensor:
        up, down = _factors(p)
        return b + up @ down[:, -1] if down.shape[1] > W.shape[1] else b

    def _decompose(self, context: InitContext) -> tuple[Tensor, Tensor]:
        """Return left singular vectors (out, R) and V."""
        weight, bias = context.weight(), context.bias()
        joined = weight if bias is None else torch.cat([weight, bias.to(weight)[:, None]], 1)
        left, _, right = truncated_svd(joined, min(self.r, *joined.shape), rounds=2, seed=self.random_seed)
        return left, right

    def _group(self, context: InitContext) -> Tensor:
        """Return, in the order of the groups, the group of each row and the row: (2, out)."""
        labels = cluster(self._decompose(context)[0], min(self.num_subspaces, context.shape[1]))
        order = torch.argsort(labels, stable=True)
        return torch.stack([labels[order], order])

    def _directions(self, context: InitContext) -> Tensor:
        """Return the A_k: right singular vectors of each group's left singular vectors, and zeros beyond r_k."""
        left, (labels, order) = self._decompose(context)[0], context.params.adamss_groups
        directions = torch.zeros(context.shape)
        for group, matrix in enumerate(directions):
            _, s, right = torch.linalg.svd(left[order[labels == group]], full_matrices=False)
            found = int((s**2 > self.svd_threshold * s[:1] ** 2).sum()) if self.use_dynamic_rank else len(s)
            rank = min(max(found, 1), len(s), len(matrix))
            matrix[:rank] = right[:rank]
        return directions


def _factors(p: Params) -> tuple[Tensor, Tensor]:
    """Return the factors (out, K·r) and (K·r, in + 1) of the change."""
    groups, rows = p.adamss_groups
    up = p.adamss_B.new_zeros(len(p.adamss_B), *p.adamss_A.shape[:2])
    return torch.index_put(up, (rows, groups), p.adamss_B).flatten(1), p.adamss_A.flatten(0, 1) @ p.adamss_newB


def cluster(points: Tensor, count: int) -> Tensor:
    """Return the cluster (n,) of each of n points by Lloyd's algorithm, with the steps of scikit-learn's KMeans.

    A cluster that loses all its points keeps its center; scikit-learn moves it.
    """
    points = points.double() - points.double().mean(0)
    shares = np.full(len(points), 1 / len(points))
    first = np.random.RandomState(_SEED).choice(len(points), count, replace=False, p=shares)
    centers = points[torch.as_tensor(first)]
    for _ in range(_ROUNDS):
        labels = torch.cdist(points, centers).argmin(1)
        members = torch.nn.functional.one_hot(labels, count).to(points)
        moved = torch.where(members.sum(0)[:, None] > 0, members.t() @ points / members.sum(0)[:, None], centers)
        shift, centers = ((moved - centers) ** 2).sum(), moved
        if shift <= _TOLERANCE * points.var(0, correction=0).mean():
            break
    return torch.cdist(points, centers).argmin(1)
