"""LN tuning: the normalisation layers trained, nothing else.

Zhao et al. 2023, arXiv 2312.11420.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lorac.ir.patterns import is_named
from lorac.ir.sites import Site, SiteKind
from lorac.variants.base import Variant
from lorac.variants.params import ParamSpec


@dataclass(frozen=True, kw_only=True)
class LNTuning(Variant):
    """Every parameter of the targeted modules takes the place of the base's: no formula, no tensors beside.

    Attributes:
        targets: any modules; the default names normalisation layers by the names they usually bear.
    """

    targets: str | tuple[str, ...] = r"(.*\.)?(\w*[nN]orm\w*|ln_\w+)"

    name: ClassVar[str] = "ln_tuning"
    paper: ClassVar[str] = (
        "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning, arXiv 2312.11420"
    )
    kinds: ClassVar[frozenset[SiteKind]] = frozenset(SiteKind) - {SiteKind.ONCE}

    def copies(self, path: str) -> bool:
        """Whether ``targets`` names the module."""
        return is_named(self.targets, path) and not (self.exclude and is_named(self.exclude, path))

    def adapts(self, site: Site) -> bool:
        """No site: a targeted layer is replaced, too."""
        return False

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {}
