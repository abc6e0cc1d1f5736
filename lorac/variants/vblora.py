"""VB-LoRA: extreme parameter-efficient fine-tuning with vector banks.

Li et al. 2024, arXiv 2405.15179; shapes and start values as in PEFT.
"""

from dataclasses import dataclass
from typing import Annotated

import torch

from lorac.argument_types import Bounds, Count
from lorac.variants._layer_shapes import require_divisor
from lorac.variants.base import Params, ParamSpec, Site, Tensor, WeightVariant
from lorac.variants.initialisers import normal, uniform
from lorac.variants.low_rank import InputDropout


@dataclass(frozen=True, kw_only=True)
class VBLoRA(InputDropout, WeightVariant):
    """``W' = W + B·A``, whose subvectors of length v are mixtures of vectors from one trained bank (h, v).

    A row of A has in/v subvectors, a column of B out/v. Each is the weighted mean of the k bank vectors with the
    largest logits; the weights are the softmax of these logits, and ties go to the lowest index.

    Attributes:
        r: rank.
        num_vectors: h.
        vector_length: v; a divisor of in and out.
        topk: k.
        init_vector_bank_bound: bound of the bank's uniform start values.
        init_logits_std: deviation of the logits' start values.
    """

    r: Count = 4
    num_vectors: Count = 256
    vector_length: Count = 256
    topk: Annotated[int, Bounds(1, "num_vectors")] = 2
    init_vector_bank_bound: Annotated[float, Bounds(0)] = 0.02
    init_logits_std: Annotated[float, Bounds(0)] = 0.1

    name = "vblora"
    paper = "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks, arXiv 2405.15179"
    identity_at_init = False

    def check(self, site: Site) -> None:
        super().check(site)
        require_divisor(site, "vector_length", self.vector_length)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        count, length, logits = self.num_vectors, self.vector_length, normal(self.init_logits_std)
        return {
            "vblora_vector_bank": ParamSpec((count, length), uniform(self.init_vector_bank_bound), shared=True),
            "vblora_logits_A": ParamSpec((self.r, site.in_features // length, count), logits),
            "vblora_logits_B": ParamSpec((site.out_features // length, self.r, count), logits),
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        down = self._mix_vectors(p.vblora_logits_A, p.vblora_vector_bank)
        up = self._mix_vectors(p.vblora_logits_B, p.vblora_vector_bank)
        return W + up.transpose(1, 2).flatten(0, 1) @ down.flatten(1)

    def _mix_vectors(self, logits: Tensor, bank: Tensor) -> Tensor:
        """Return mixtures (…, v) of the bank's vectors from logits (…, h)."""
        ordered, indices = torch.sort(logits, dim=-1, descending=True, stable=True)
        weights = torch.softmax(ordered[..., : self.topk], dim=-1)
        vectors = bank[:, : self.vector_length]  # the shared bank may be larger than this site needs
        return (weights.unsqueeze(-1) * vectors[indices[..., : self.topk]]).sum(-2)
