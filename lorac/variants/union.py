"""Union: several methods in one adapter, each at different sites, such as bottlenecks after MLPs and LoRA elsewhere.

It covers AdapterHub's ``ConfigUnion`` for parts with disjoint sites (UniPELT's design, Mao et al. 2022, arXiv
2110.07577, without its gates and prefixes).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from lorac.errors import OptionError, SiteError
from lorac.frontend.model_view import ModelView
from lorac.ir.sites.patterns import check_targets_match, is_named
from lorac.variants.adapter import Adapter
from lorac.variants.base import MATRIX_KINDS, BranchVariant, ParamSpec, Site, SiteKind, Variant, WeightVariant


@dataclass(frozen=True, kw_only=True)
class Union(Variant):
    """``f = fᵢ`` at the sites that the i-th method targets, with that method's tensor names.

    Only one method acts at a site. Each reads the adapted outputs of earlier modules, and applies its own dropout.

    Attributes:
        parts: the methods, each with its own ``targets``.
        targets: the sites of all parts; set by ``for_model``.
    """

    targets: str | Sequence[str] = ()
    parts: tuple[WeightVariant | BranchVariant, ...]

    name = "union"
    paper = "Adapters: A Unified Library for Parameter-Efficient and Modular Transfer Learning, arXiv 2311.11077"
    kinds = MATRIX_KINDS | {SiteKind.BLOCK, SiteKind.MATRIX}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts:
            raise OptionError("a union needs at least one method", next_step="give methods with targets= as parts=")
        for part in self.parts:
            if isinstance(part, BranchVariant) and part.has_once:
                raise OptionError(
                    f"a union cannot hold {part.name}, which computes values once per call for all its sites",
                    next_step="give it as an adapter of its own; a weighted swap activates both",
                )

    @property
    def methods(self) -> tuple[Variant, ...]:
        return self.parts

    def method_at(self, path: str) -> Variant:
        found = next((part for part in self.parts if is_named(part.targets, path)), None)
        if found is None:
            raise SiteError(
                f"no method of the union ({', '.join(part.name for part in self.parts)}) targets '{path}'",
                next_step="name the module in the targets= of one of them",
            )
        return found

    def at_path(self, path: str) -> Variant:
        return self.method_at(path).at_path(path)

    def adapts(self, site: Site) -> bool:
        return self.method_at(site.path).adapts(site)

    def starts_as_base(self, site: Site) -> bool:
        return self.at(site).starts_as_base(site)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return self.at(site).params(site)

    def for_model(self, view: ModelView, inputs: object = None) -> "Union":
        """Return this union with full paths as its parts' targets.

        Raises:
            SiteError: a part names no site, or two parts name the same site.
        """
        parts: list[Variant] = []
        for part in (part.for_model(view, inputs) for part in self.parts):
            if isinstance(part, BranchVariant) and not isinstance(part.targets, str):  # it lists full paths already
                parts.append(part)
                continue
            check_targets_match(part.name, part.targets, view.sites)
            paths = tuple(site.path for site in part.named_sites(view) if part.adapts(site))
            parts.append(dataclasses.replace(part, targets=paths, exclude=(), layers=()) if paths else part)
        return Union.over(*parts, like=self)

    @classmethod
    def of(cls, *adapters: Adapter, name: str) -> Adapter:
        """Combine several adapters that act at different sites into one; the tensors are shared, not copied.

        Args:
            name: name of the result.

        Raises:
            SiteError: two adapters act at the same site.
            ChoiceError: two adapters replace the same parameter.
        """
        parts = (dataclasses.replace(one.variant, targets=tuple(one.tensors), exclude=()) for one in adapters)
        joined = Adapter(name, cls.over(*parts))
        for adapter in adapters:
            joined.tensors |= adapter.tensors
            joined.join_replaced(adapter)
        return joined

    @classmethod
    def over(cls, *parts: Variant, like: Variant | None = None) -> "Union":
        """Return a union of methods whose targets are full paths.

        Args:
            parts: the methods.
            like: a variant with the union's ``modules_to_save`` and ``bias``.

        Raises:
            SiteError: two methods name the same site.
        """
        paths = [path for part in parts for path in part.targets]
        duplicates = [path for path in paths if paths.count(path) > 1]
        if duplicates:
            both = [part.name for part in parts if duplicates[0] in part.targets]
            raise SiteError(
                f"{' and '.join(both)} both target '{duplicates[0]}', where only one method of a union can act",
                next_step="narrow their targets=, or give them as two adapters, whose changes add up",
            )
        whole = {} if like is None else {"modules_to_save": like.modules_to_save, "bias": like.bias}
        return cls(parts=parts, targets=tuple(paths), **whole)  # type: ignore[arg-type]  # checked against the annotation
