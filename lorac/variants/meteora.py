"""MeteoRA: existing LoRAs as experts in every linear layer; a gate routes each token to its top k.

Xu, Lai, Huang, ICLR 2025, arXiv 2405.13053. Only the gates are trained, as in the paper; the released script trains
the LoRAs too (``train_experts``).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lorac.argument_types import Count, Positive
from lorac.variants._mixtures import LoraMixture, RoutedVariant, top_k_softmax
from lorac.variants.base import Context, Params, ParamSpec, Role, Site, Tensor
from lorac.variants.initialisers import kaiming_uniform
from lorac.variants.low_rank import factor_specs


@dataclass(frozen=True, kw_only=True)
class MeteoRA(LoraMixture, RoutedVariant):
    """``y' = y + s·Σ_{j ∈ top-k(z)} w_j·B_j·A_j·x``, z = G·x, w = softmax(z/temperature) over the chosen, s = alpha/r.

    A (experts·r, in) and B (out, experts·r) are the experts' stacked factors, G (experts, in) is the gate. The logits z
    (…, experts) are emitted as ``"router"``.

    Attributes:
        r: rank of each expert.
        alpha: PEFT's lora_alpha, of all experts.
        experts: number of experts.
        top_k: number of experts per token; ties go to the lowest index.
        temperature: divisor of the logits before the softmax (15 to 30 for the paper's composite prompts).
        dropout: rate of the dropout on each expert's input, in training; the gates read the input without dropout.
        train_experts: whether A and B are trained too.
    """

    r: Count = 8
    alpha: float = 8
    experts: Count = 4
    top_k: Count = 2
    temperature: Positive = 1.0
    dropout: float = 0.0
    train_experts: bool = False

    name = "meteora"
    rank_fields = ("r", "alpha")
    paper = "MeteoRA: Multiple-tasks Embedded LoRA for Large Language Models, arXiv 2405.13053"

    def params(self, site: Site) -> dict[str, ParamSpec]:
        role = Role.TRAINABLE if self.train_experts else Role.FROZEN
        gate = ParamSpec((self.experts, site.in_features), kaiming_uniform)
        return factor_specs(site, self.experts * self.r, role) | {"moe_gate": gate}

    def output_scale(self, p: Params) -> float:
        return self.alpha / self.r

    def branch(self, x: Tensor, y: Tensor, p: Params, ctx: Context) -> Tensor:
        logits = F.linear(x, p.moe_gate)
        ctx.emit("router", logits)
        weights = top_k_softmax(logits, self.top_k, self.temperature)
        return y + self.mix(self._project(x, p, ctx), self.output_scale(p) * weights, p)

    def _project(self, x: Tensor, p: Params, ctx: Context) -> Tensor:
        """Return A·x (…, experts·r), with a separate dropout mask on x for each expert."""
        if not self.dropout or not ctx.training:
            return F.linear(x, p.lora_A)
        each = (F.linear(F.dropout(x, self.dropout), a) for a in p.lora_A.chunk(self.experts))
        return torch.cat([*each], dim=-1)
