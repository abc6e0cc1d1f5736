"""Uni-LoRA: the entries of all layers' factors are copies of the values of one trained vector.

Li et al. 2025, arXiv 2506.00799; assignment of the values as in PEFT's UNILORA.
"""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import torch

from lorac.argument_types import Bounds, Count
from lorac.frontend.model_view import ModelView
from lorac.variants.base import InitContext, Params, ParamSpec, Role, Site, Tensor, WeightVariant
from lorac.variants.initialisers import uniform
from lorac.variants.low_rank import InputDropout


@functools.lru_cache(maxsize=1)
def _assign(count: int, length: int, seed: int) -> Tensor:
    """Return c·length + i for each entry (count,) that is the c-th copy of the i-th of ``length`` values; random order.

    Every value has count // length copies, and some values have one more; NumPy's generator decides the order.
    """
    generator = np.random.default_rng(seed)
    copies, rest = divmod(count, length)
    extra = generator.choice(length, size=rest, replace=False) if rest else np.arange(0)
    order = np.arange(count)
    generator.shuffle(order)
    values = np.concatenate([np.repeat(np.arange(length), copies), extra])[order]
    copy = np.where(order < copies * length, order % max(copies, 1), copies)
    return torch.as_tensor(copy * length + values)


@dataclass(frozen=True, kw_only=True)
class UniLoRA(InputDropout, WeightVariant):
    """``W' = W + B·A``: each entry of all sites' A and B is θᵢ/√nᵢ, θ one trained vector, nᵢ the number of θᵢ's copies.

    The assignment of entries to i is random and frozen: unilora_places (1, r·(in + out)) are the copies in A, then in
    B, row by row, and unilora_scales are their factors 1/√nᵢ.

    Attributes:
        r: rank.
        theta_d_length: length of θ.
        proj_seed: seed of the assignment.
        init_theta_d_bound: bound of θ's uniform start values.
        starts: path of a site -> the number of entries of the sites before it; ``""`` -> the number of all entries; set
            by ``for_model``.
    """

    r: Count = 4
    theta_d_length: Count = 256
    proj_seed: Annotated[int, Bounds(0, 2**63 - 1)] = 42
    init_theta_d_bound: Annotated[float, Bounds(0)] = 0.02
    starts: Mapping[str, int] = field(default_factory=dict)

    name = "unilora"
    paper = "Uni-LoRA: One Vector is All You Need, arXiv 2506.00799"
    identity_at_init = False

    def for_model(self, view: ModelView, inputs: object = None) -> "UniLoRA":
        starts, total = {}, 0
        for site in self.named_sites(view):
            starts[site.path] = total
            total += self.r * (site.out_features + site.in_features)
        return dataclasses.replace(self, starts=starts | {"": total})

    def params(self, site: Site) -> dict[str, ParamSpec]:
        size = self.r * (site.in_features + site.out_features)
        copies = self.starts.get("", size) // self.theta_d_length + 1
        below = (copies * self.theta_d_length,)
        return {
            "unilora_theta_d": ParamSpec((self.theta_d_length,), uniform(self.init_theta_d_bound), shared=True),
            "unilora_places": ParamSpec((1, size), lambda c: self._places(c)[None].clone(), Role.INDEX, below=below),
            "unilora_scales": ParamSpec((size,), self._scales, Role.FROZEN),
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        entries = p.unilora_theta_d[p.unilora_places[0] % self.theta_d_length] * p.unilora_scales
        middle = self.r * W.shape[1]
        return W + entries[middle:].reshape(-1, self.r) @ entries[:middle].reshape(self.r, -1)

    def _places(self, context: InitContext) -> Tensor:
        size, start = context.shape[-1], self.starts.get(context.site.path, 0)
        return _assign(self.starts.get("", size), self.theta_d_length, self.proj_seed)[start : start + size]

    def _scales(self, context: InitContext) -> Tensor:
        size = context.shape[-1]
        every = _assign(self.starts.get("", size), self.theta_d_length, self.proj_seed) % self.theta_d_length
        counts = torch.bincount(every, minlength=self.theta_d_length)
        return counts[self._places(context) % self.theta_d_length].float().rsqrt()
