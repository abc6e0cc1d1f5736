"""Lily: neighbouring layers share down-projections, and all layers share up-projections that a router mixes.

Zhong et al. 2024, arXiv 2407.09946; sharing, mean of the router and start values as in PEFT.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from lorac.argument_types import Count
from lorac.frontend.model_view import ModelView
from lorac.variants.base import BranchVariant, Context, Params, ParamSpec, Site, SiteKind, Tensor
from lorac.variants.initialisers import kaiming_uniform, zeros


def group_sites(targets: str | Sequence[str], stride: int, sites: Iterable[Site]) -> dict[str, list[str]]:
    """Return path -> the first site with the same A, and the first with the same B.

    Layers of one target and shape share B; each ``stride`` consecutive layers of these share A.
    """
    names = [targets] if isinstance(targets, str) else sorted(targets, key=len)
    groups: dict[tuple[object, ...], list[str]] = {}
    for site in sites:
        target = next((name for name in reversed(names) if site.path.endswith(name)), "")
        groups.setdefault((target, *site.kernel), []).append(site.path)
    return {
        path: [group[index - index % stride], group[0]] for group in groups.values() for index, path in enumerate(group)
    }


@dataclass(frozen=True, kw_only=True)
class Lily(BranchVariant):
    """``y' = y + s·Σ_e p_e·B_eᵀ·A·x``, p the mean over all rows and tokens of softmax(R·A·x).

    A (r, in), R (num_B, r), and num_B matrices B_e (r, out), concatenated by rows. A row's output depends on all other
    rows of the call that use the adapter.

    Attributes:
        r: rank.
        stride_A: number of consecutive layers that share A.
        num_B: number of B_e.
        scaling: s.
        owners: module path -> the modules whose A and B it shares; set by ``for_model``.
    """

    r: Count = 32
    stride_A: Count = 1
    num_B: Count = 2
    scaling: float = 1.0
    owners: Mapping[str, Sequence[str]] = field(default_factory=dict)

    name = "lily"
    paper = "Low-Rank Interconnected Adaptation across Layers, arXiv 2407.09946"
    kinds = frozenset({SiteKind.LINEAR})
    mixes_tokens = True

    def for_model(self, view: ModelView, inputs: object = None) -> "Lily":
        return replace(self, owners=group_sites(self.targets, self.stride_A, self.named_sites(view)))

    def params(self, site: Site) -> dict[str, ParamSpec]:
        of_a, of_b = (
            f"{owner}.{index}" if owner else "" for index, owner in enumerate(self.owners.get(site.path, ("", "")))
        )
        return {
            "lily_A": ParamSpec((self.r, site.in_features), kaiming_uniform, tie=of_a),
            "lily_B": ParamSpec((self.num_B * self.r, site.out_features), zeros, tie=of_b),
            "lily_router": ParamSpec((self.num_B, self.r), kaiming_uniform),
        }

    def branch(self, x: Tensor, y: Tensor, p: Params, ctx: Context) -> Tensor:
        hidden = F.linear(x, p.lily_A)
        shares = torch.softmax(F.linear(hidden, p.lily_router), -1).reshape(-1, self.num_B).mean(0)
        up = (shares[:, None, None] * p.lily_B.unflatten(0, (self.num_B, -1))).sum(0)
        return y + self.scaling * (hidden @ up)
