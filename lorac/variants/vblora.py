"""VB-LoRA: extreme parameter-efficient fine-tuning with vector banks.

Li et al. 2024, arXiv 2405.15179; shapes and start values as in PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lorac.errors import SiteError
from lorac.ir.algebra.reduction import Params
from lorac.ir.sites import Site
from lorac.ir.slots.live_terms import Dropout
from lorac.variants import _initialisers as _inits
from lorac.variants.base import WeightVariant
from lorac.variants.params import InitContext, ParamSpec

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True)
class VBLoRA(WeightVariant):
    """``W' = W + B·A``, whose pieces of length v are mixtures of vectors from one trained bank (h, v).

    A row of A is in/v pieces, a column of B out/v; each piece is the mean of the k vectors of largest logit, weighted
    by the softmax of those logits. Of equal logits the first goes before.

    Attributes:
        r: rank.
        num_vectors: h.
        vector_length: v; it divides in and out.
        topk: k.
        init_vector_bank_bound: the bank starts uniform within ± this.
        init_logits_std: deviation that the logits start with.
        dropout: rate of the dropout on the branch's input, in training.
    """

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1
    dropout: float = 0.0

    name: ClassVar[str] = "vblora"
    paper: ClassVar[str] = "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks, arXiv 2405.15179"
    dropout_place: ClassVar[Dropout] = Dropout.INPUT
    identity_at_init: ClassVar[bool] = False

    def check(self, site: Site) -> None:
        super().check(site)
        if site.in_features % self.vector_length or site.out_features % self.vector_length:
            raise SiteError(
                f"vector_length={self.vector_length} divides not both sides of '{site.path}', "
                f"{site.in_features} -> {site.out_features}",
                next_step="give a vector_length= that divides both, or exclude= the module",
                code="site_unsupported",
            )
        if not 1 <= self.topk <= self.num_vectors:
            raise SiteError(
                f"topk={self.topk} of num_vectors={self.num_vectors} cannot be chosen",
                next_step="give a topk= from 1 to num_vectors=",
                code="site_unsupported",
            )

    def params(self, site: Site) -> dict[str, ParamSpec]:
        count, length, logits = self.num_vectors, self.vector_length, _inits.normal(self.init_logits_std)
        return {
            "vblora_vector_bank": ParamSpec((count, length), self._start_bank, shared=True),
            "vblora_logits_A": ParamSpec((self.r, site.in_features // length, count), logits),
            "vblora_logits_B": ParamSpec((site.out_features // length, self.r, count), logits),
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        down = self._pieces(p.vblora_logits_A, p.vblora_vector_bank)
        up = self._pieces(p.vblora_logits_B, p.vblora_vector_bank)
        return W + up.transpose(1, 2).flatten(0, 1) @ down.flatten(1)

    def _pieces(self, logits: Tensor, bank: Tensor) -> Tensor:
        """(…, v) from logits (…, h)."""
        ordered, places = torch.sort(logits, dim=-1, descending=True, stable=True)
        weights = torch.softmax(ordered[..., : self.topk], dim=-1)
        vectors = bank[:, : self.vector_length]  # as what sites share may be larger than this one asks
        return (weights.unsqueeze(-1) * vectors[places[..., : self.topk]]).sum(-2)

    def _start_bank(self, context: InitContext) -> Tensor:
        bound = self.init_vector_bank_bound
        return torch.empty(context.shape).uniform_(-bound, bound, generator=context.generator)
