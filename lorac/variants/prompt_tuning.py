"""Prompt tuning: virtual tokens before every sequence, stored as rows after the input embedding's rows.

Lester et al. 2021, arXiv 2104.08691. PEFT's PROMPT_TUNING; P_TUNING (Liu et al. 2021, arXiv 2103.10385), CPT (Blau et
al. 2024, arXiv 2410.17222) and each task of MULTITASK_PROMPT_TUNING have the same form after training.
"""

from dataclasses import dataclass

from lorac.argument_types import Count
from lorac.variants._embedded_prompts import EmbeddedPromptVariant
from lorac.variants.base import ParamSpec, Site
from lorac.variants.initialisers import normal


@dataclass(frozen=True, kw_only=True)
class PromptTuning(EmbeddedPromptVariant):
    """``E' = [E; P]``: rows P (n, d) after an input embedding E (V, d), for ids V … V + n − 1 before each sequence.

    Attributes:
        num_virtual_tokens: n.
    """

    num_virtual_tokens: Count = 8

    name = "prompt_tuning"
    paper = "The Power of Scale for Parameter-Efficient Prompt Tuning, arXiv 2104.08691"

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {"prompt": ParamSpec((self.num_virtual_tokens, site.out_features), normal(1.0))}
