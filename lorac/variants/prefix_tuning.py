"""Prefix tuning: trained keys and values precede those of every sequence, at each layer of a decoder.

Li and Liang 2021, arXiv 2101.00190. PEFT's PREFIX_TUNING, and CARTRIDGE (Eyuboglu et al. 2025, arXiv 2506.06266), which
differs only in training.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from lorac.argument_types import Count
from lorac.errors import SiteError
from lorac.frontend.model_view import ModelView
from lorac.ir.slots.prefix import Prefix
from lorac.variants.base import Params, ParamSpec, PromptVariant, Role, Site, Tensor, Variant


def _refuse_training(*_: object) -> NoReturn:
    raise SiteError(
        "lorac does not train keys and values before a sequence",
        next_step="train them with PEFT's PrefixTuningConfig, and compile with the folder in adapters=",
    )


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(PromptVariant):
    """``softmax(q·[K_P; K]ᵀ/√s)·[V_P; V]`` at each layer: K_P, V_P (n, heads, s) precede a sequence's keys and values.

    Attributes:
        num_virtual_tokens: n.
        num_layers: layers of the decoder.
        num_attention_heads: number of heads of keys and values.
        token_dim: heads · s.
    """

    num_virtual_tokens: Count = 8
    num_layers: Count
    num_attention_heads: Count
    token_dim: Count

    acts_at_sites = False
    name = "prefix_tuning"
    paper = "Prefix-Tuning: Optimizing Continuous Prompts for Generation, arXiv 2101.00190"

    def for_model(self, view: ModelView, inputs: object = None) -> Variant:
        _refuse_training()

    def params(self, site: Site) -> dict[str, ParamSpec]:
        shape = (self.num_virtual_tokens, 2 * self.num_layers * self.token_dim)
        return {"keys_values": ParamSpec(shape, _refuse_training, Role.FROZEN)}

    def prefix(self, site: Site, tensors: Mapping[str, Tensor]) -> Prefix:
        sizes = 2 * self.num_layers, self.num_attention_heads, self.token_dim // self.num_attention_heads
        split = self.rows(Params(**tensors)).reshape(self.num_virtual_tokens, *sizes)
        return Prefix(site, split.permute(1, 2, 0, 3).contiguous(), attends=True)
