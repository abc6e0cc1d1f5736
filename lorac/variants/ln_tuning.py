"""LN tuning: only the normalisation layers are trained.

Zhao et al. 2023, arXiv 2312.11420.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lorac.ir.sites.patterns import is_named
from lorac.variants.base import ParamSpec, Site, SiteKind, Variant


@dataclass(frozen=True, kw_only=True)
class LNTuning(Variant):
    """Every parameter of the targeted modules replaces the base's: there is no formula and no other tensor.

    Attributes:
        targets: any modules; the default matches the usual names of normalisation layers.
    """

    targets: str | Sequence[str] = r"(.*\.)?(\w*[nN]orm\w*|ln_\w+)"

    name = "ln_tuning"
    paper = "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning, arXiv 2312.11420"
    kinds = frozenset(SiteKind) - {SiteKind.ONCE}

    def replaces_module(self, path: str) -> bool:
        return is_named(self.targets, path) and not (self.exclude and is_named(self.exclude, path))

    def adapts(self, site: Site) -> bool:
        return False  # a targeted linear layer is replaced whole too

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {}
