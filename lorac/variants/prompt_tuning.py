"""Prompt tuning: virtual tokens before every sequence, as rows behind those of the input embedding.

Lester et al. 2021, arXiv 2104.08691. PEFT's PROMPT_TUNING; P_TUNING (Liu et al. 2021, arXiv 2103.10385) and CPT
(Blau et al. 2024, arXiv 2410.17222) are the same once they are trained, and a task of MULTITASK_PROMPT_TUNING is.
"""

from dataclasses import dataclass

from lorac.argument_types import Count
from lorac.variants.base import ParamSpec, PromptVariant, Site
from lorac.variants.initialisers import normal


@dataclass(frozen=True, kw_only=True)
class PromptTuning(PromptVariant):
    """``E' = [E; P]``: rows P (n, d) behind an input embedding E (V, d), for ids V … V + n − 1 before each sequence.

    Attributes:
        num_virtual_tokens: n.
    """

    num_virtual_tokens: Count = 8

    name = "prompt_tuning"
    paper = "The Power of Scale for Parameter-Efficient Prompt Tuning, arXiv 2104.08691"

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {"prompt": ParamSpec((self.num_virtual_tokens, site.out_features), normal(1.0))}
