"""Union: several methods as one adapter, each at sites of its own, such as bottlenecks behind MLPs beside a LoRA.

Of the adapters that AdapterHub calls a ``ConfigUnion`` those whose parts meet at no site (UniPELT's design, Mao et al.
2022, arXiv 2110.07577, without its gates and prefixes).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from lorac.errors import OptionError, SiteError
from lorac.frontend.model_view import ModelView
from lorac.ir.patterns import check_targets_match, is_named
from lorac.ir.sites import Site, SiteKind
from lorac.variants.base import MATRIX_KINDS, BranchVariant, Variant, WeightVariant
from lorac.variants.params import ParamSpec


@dataclass(frozen=True, kw_only=True)
class Union(Variant):
    """``f = fᵢ`` at the sites that the i-th method targets; its tensors bear the names that this method gives them.

    Nothing is summed: no two methods act at one site, and what one of them changes the next takes as its input, in the
    order in which the model calls its modules. Each keeps its own dropout.

    Attributes:
        parts: the methods, each with ``targets`` of its own.
        targets: all that theirs name; settled where the union meets a model.
    """

    targets: str | tuple[str, ...] = ()
    parts: tuple[WeightVariant | BranchVariant, ...]

    name: ClassVar[str] = "union"
    paper: ClassVar[str] = (
        "Adapters: A Unified Library for Parameter-Efficient and Modular Transfer Learning, arXiv 2311.11077"
    )
    kinds: ClassVar[frozenset[SiteKind]] = MATRIX_KINDS | {SiteKind.BLOCK, SiteKind.MATRIX}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts:
            raise OptionError("a union of no methods", next_step="give the methods as parts=, each with its targets=")
        for part in self.parts:
            if isinstance(part, BranchVariant) and part.has_once:
                raise OptionError(
                    f"a union takes no {part.name}, which computes once per call what all its sites read",
                    next_step="give it as an adapter of its own; a weighted swap has both active",
                )

    @property
    def methods(self) -> tuple[Variant, ...]:
        return self.parts

    def method_at(self, path: str) -> Variant:
        found = next((part for part in self.parts if is_named(part.targets, path)), None)
        if found is None:
            raise SiteError(
                f"none of the methods of a union ({', '.join(part.name for part in self.parts)}) targets '{path}'",
                next_step="name the module in the targets= of one of them",
                code="site_unsupported",
            )
        return found

    def at_path(self, path: str) -> Variant:
        return self.method_at(path).at_path(path)

    def at(self, site: Site) -> Variant:
        return self.method_at(site.path).at(site)

    def adapts(self, site: Site) -> bool:
        return self.method_at(site.path).adapts(site)

    def starts_as_base(self, site: Site) -> bool:
        return self.at(site).starts_as_base(site)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return self.at(site).params(site)

    def for_model(self, view: ModelView, inputs: object = None) -> Union:
        """This union with the sites of its parts by their paths.

        Raises:
            SiteError: a part names no site.
            SiteError: two parts name one.
        """
        parts = tuple(_resolve_sites(part.for_model(view, inputs), view) for part in self.parts)
        return Union.of(*parts, like=self)

    @classmethod
    def of(cls, *parts: Variant, like: Variant | None = None) -> Union:
        """A union of methods that name their sites by whole paths.

        Args:
            parts: the methods.
            like: whose ``modules_to_save`` and ``bias`` it has.

        Raises:
            SiteError: two of them name one site.
        """
        paths = [path for part in parts for path in part.targets]
        twice = [path for path in paths if paths.count(path) > 1]
        if twice:
            both = [part.name for part in parts if twice[0] in part.targets]
            raise SiteError(
                f"'{twice[0]}' is a site of {' and '.join(both)}, and of the methods of a union one acts at a site",
                next_step="narrow their targets=, or make adapters of their own of them, whose changes add up",
                code="site_unsupported",
            )
        whole = {} if like is None else {"modules_to_save": like.modules_to_save, "bias": like.bias}
        return cls(parts=parts, targets=tuple(paths), **whole)  # type: ignore[arg-type]  # held against the annotation


def _resolve_sites(part: Variant, view: ModelView) -> Variant:
    """A part with its targets by whole paths; a branch that names modules names them by these already."""
    if isinstance(part, BranchVariant) and not isinstance(part.targets, str):
        return part
    check_targets_match(part.name, part.targets, view.sites)
    paths = tuple(site.path for site in part.named_sites(view) if part.adapts(site))
    return dataclasses.replace(part, targets=paths, exclude=(), layers=()) if paths else part
