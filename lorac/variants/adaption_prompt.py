"""LLaMA-Adapter: upper attentions of a decoder also attend to learned prompts, with a gate that starts at zero.

Zhang et al. 2023, arXiv 2303.16199; places and start values as in PEFT's ADAPTION_PROMPT.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lorac.argument_types import Count
from lorac.errors import SiteError
from lorac.variants.base import BranchVariant, Context, Params, ParamSpec, Site, SiteKind, Tensor
from lorac.variants.initialisers import normal, zeros

_PROJECTIONS = {"o_proj": ("q_proj", "k_proj", "v_proj"), "c_proj": ("c_attn",)}
"""Output projection -> the layers of the same attention that compute queries, keys and values."""
PLACES = {"llama": "self_attn.o_proj", "mistral": "self_attn.o_proj", "gpt2": "attn.c_proj"}
"""transformers' model type -> suffix of the paths of the attentions' output projections."""


@dataclass(frozen=True, kw_only=True)
class AdaptionPrompt(BranchVariant):
    """``y' = y + g·O·[softmax(q_h·K_hᵀ/√s)·V_h]``, h the heads: K = P·W_Kᵀ + b_K and V = P·W_Vᵀ + b_V of a prompt P.

    P is (1, n, d), g a number, s the size of a head. O, W_K and W_V are the attention's projections, with biases, y is
    O's output, and q are the attention's queries at their rotary positions. For GPT-2 O is left out, as in PEFT.
    ``AdaptionPrompt.of(model)`` reads the fields from a model.

    Attributes:
        targets: the output projections.
        adapter_len: n.
        adapter_layers: number of adapted attentions, counted from the last layer.
        num_attention_heads: number of heads of queries.
        rotary: path of the module that computes the cosines and sines of positions; empty: there is none.
    """

    targets: str | Sequence[str]
    adapter_len: Count = 10
    adapter_layers: Count = 1
    num_attention_heads: Count
    rotary: str = ""

    name = "adaption_prompt"
    paper = "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention, arXiv 2303.16199"
    kinds = frozenset({SiteKind.LINEAR})

    def check(self, site: Site) -> None:
        super().check(site)
        if site.path.rpartition(".")[2] not in _PROJECTIONS or site.in_features % self.num_attention_heads:
            raise SiteError(
                f"'{site.path}' is not the output projection of an attention with {self.num_attention_heads} heads",
                next_step="use lorac.AdaptionPrompt.of(model), which finds those of the model",
            )

    def params(self, site: Site) -> dict[str, ParamSpec]:
        prompt = ParamSpec((1, self.adapter_len, site.out_features), normal(1.0))
        return {"adaption_prompt": prompt, "adaption_gate": ParamSpec((1,), zeros)}

    def reads(self, site: Site) -> tuple[str, ...]:
        query, *layers = self._layers(site)
        tensors = [f"weight:{layer}" for layer in layers] + [f"param:{layer}.bias" for layer in layers if site.bias]
        return (query, *tensors, *((self.rotary, f"{self.rotary}[1]") if self.rotary else ()))

    def branch(self, x: Tensor, y: Tensor, p: Params, ctx: Context) -> Tensor:
        query, *layers = self._layers(ctx.site)
        heads, width = self.num_attention_heads, x.shape[-1]
        weights = [ctx.value(f"weight:{layer}") for layer in layers]
        biases = [ctx.value(f"param:{layer}.bias") if ctx.site.bias else None for layer in layers]
        pairs = list(zip(weights, biases, strict=True))
        output = pairs.pop() if len(pairs) > 1 else None
        projected = torch.cat([F.linear(p.adaption_prompt[0], *pair) for pair in pairs], -1)
        projected = projected if output else projected[:, width:]  # GPT-2's layer returns queries first
        k, v = projected.unflatten(-1, (2, -1, width // heads)).permute(1, 2, 0, 3)
        k, v = (tensor.repeat_interleave(heads // tensor.shape[0], 0) for tensor in (k, v))
        q = ctx.value(query)[..., :width].unflatten(-1, (heads, -1)).transpose(-3, -2)
        if self.rotary:
            cos, sin = (ctx.value(name).unsqueeze(-3) for name in (self.rotary, f"{self.rotary}[1]"))
            first, second = q.chunk(2, -1)
            q = q * cos + torch.cat([-second, first], -1) * sin
        scores = q @ k.mT * q.shape[-1] ** -0.5
        shares = torch.softmax(scores.to(torch.promote_types(scores.dtype, torch.float32)), -1).to(scores.dtype)
        mixed = (p.adaption_gate * shares @ v).transpose(-3, -2).flatten(-2)
        return y + (F.linear(mixed, *output) if output else mixed)

    def _layers(self, site: Site) -> list[str]:
        """Return the layers for queries, for keys and values, and for the output if it is part of the formula."""
        owner, _, leaf = site.path.rpartition(".")
        query, *others = (f"{owner}.{name}" for name in _PROJECTIONS[leaf])
        return [query, *others, site.path] if others else [query, query]

    @staticmethod
    def of(model: nn.Module, **sizes: Any) -> "AdaptionPrompt":
        """Return a method for the upper attentions of a model; the model's configuration decides its other fields.

        Args:
            **sizes: adapter_len and adapter_layers.

        Raises:
            SiteError: the method does not know this type of model, or the model has fewer attentions.
        """
        config: Any = getattr(model, "config", None)
        place, wanted = PLACES.get(getattr(config, "model_type", ""), "-"), sizes.get("adapter_layers", 1)
        paths = [path for path, _ in model.named_modules()]
        found = [path for path in paths if path.endswith(f".{place}")]
        if len(found) < wanted:
            raise SiteError(
                f"{type(model).__name__} has {len(found)} places for adaption prompts, and adapter_layers={wanted}",
                next_step=f"give a model of transformers of type {' or '.join(PLACES)}, with at least as many layers",
            )
        rotary, heads = next((path for path in paths if path.endswith("rotary_emb")), ""), config.num_attention_heads
        return AdaptionPrompt(targets=tuple(found[-wanted:]), num_attention_heads=heads, rotary=rotary, **sizes)
