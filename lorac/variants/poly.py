"""Poly: a layer's skills are LoRAs, and every task mixes them with trained weights.

Ponti et al. 2022, arXiv 2202.13914; several splits are multi-head routing: Caccia et al. 2023, arXiv 2211.03831. Layout
and start values as in PEFT, whose logits start within 1e-3 of zero.
"""

from dataclasses import dataclass
from typing import Annotated

import torch

from lorac.argument_types import Bounds, Count
from lorac.errors import OptionError
from lorac.variants._layer_shapes import require_divisor
from lorac.variants.adapter import Adapter, split_tasks
from lorac.variants.base import Params, ParamSpec, Site, SiteKind, Tensor, WeightVariant
from lorac.variants.initialisers import uniform, zeros

_LEAST = 1e-12


@dataclass(frozen=True, kw_only=True)
class Poly(WeightVariant):
    """``W' = W + (A·B)ᵀ/r`` with A (in, r) and B (r, out) of one task: ``Σ_s w_qs·A_qs`` in split q of in, and B alike.

    w_qs is sigmoid(logits) of the task, divided by their sum over the skills s. ``by_task`` makes an adapter for each
    task over the same tensors, and rows of a call may use different tasks. Training uses the mean of PEFT's noisy w.

    Attributes:
        r: rank of a skill.
        n_tasks: number of tasks.
        n_skills: number of skills.
        n_splits: number of splits of in and out; a divisor of both.
        task: the task that acts, from 0.
    """

    r: Count = 8
    n_tasks: Count = 1
    n_skills: Count = 4
    n_splits: Count = 1
    task: Annotated[int, Bounds(0)] = 0

    name = "poly"
    paper = "Combining Modular Skills in Multitask Learning, arXiv 2202.13914"
    kinds = frozenset({SiteKind.LINEAR})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task >= self.n_tasks:
            raise OptionError(
                f"task={self.task} does not exist, since n_tasks={self.n_tasks}",
                next_step=f"give a task from 0 to {self.n_tasks - 1}",
            )

    @staticmethod
    def by_task(adapter: Adapter) -> dict[str, Adapter]:
        """Return one adapter per task of a Poly adapter, named ``<adapter>-<task>``; all share its tensors."""
        return split_tasks(adapter, Poly, "n_tasks")

    def check(self, site: Site) -> None:
        super().check(site)
        require_divisor(site, "n_splits", self.n_splits)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        counts, columns = (self.n_splits, self.n_skills), site.in_features // self.n_splits
        return {
            "poly_lora_A": ParamSpec((*counts, columns, self.r), uniform(max(columns, 1) ** -0.5)),
            "poly_lora_B": ParamSpec((*counts, self.r, site.out_features // self.n_splits), zeros),
            "poly_router_module_logits": ParamSpec((self.n_tasks, self.n_splits * self.n_skills), zeros),
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        chosen = torch.sigmoid(p.poly_router_module_logits[self.task]).reshape(self.n_splits, self.n_skills, 1, 1)
        shares = chosen / (chosen.sum(1, keepdim=True) + _LEAST)
        down, up = ((shares * factor).sum(1) for factor in (p.poly_lora_A, p.poly_lora_B))
        return W + up.transpose(1, 2).reshape(-1, self.r) @ down.reshape(-1, self.r).t() / self.r
