"""Chain: methods in sequence; each changes the weight that the previous method returns.

Active adapters are summed, in any order, each as a change of the base's weight. PEFT applies adapters of some types
(BAT, OFT, BOFT, HRA) on top of each other; ``Chain.of`` combines such adapters into one.
"""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from lorac.errors import OptionError, unmergeable_error
from lorac.ir.sites.patterns import select_sites
from lorac.variants._composite import CompositeVariant
from lorac.variants.adapter import Adapter
from lorac.variants.base import InitContext, Params, Site, Tensor, Variant, WeightVariant
from lorac.variants.params import select_params


@dataclass(frozen=True, kw_only=True)
class Chain(CompositeVariant):
    """``W' = fₙ(… f₂(f₁(W)))``, fᵢ the formula of the i-th part; its tensors are called ``part<i>_<name>``, from 0.

    Attributes:
        parts: the methods, in order. A part acts at a site that its ``targets`` (by default the chain's), ``exclude``
            and ``layers`` select. Dropout of parts is not applied, since dropout belongs to a whole term.
    """

    parts: tuple[WeightVariant, ...]

    name = "chain"

    def __post_init__(self) -> None:
        for part in self.parts if isinstance(self.parts, list | tuple) else ():
            if not isinstance(part, WeightVariant):
                raise OptionError(
                    f"a chain is made of methods that edit weights, and {part!r} is not one",
                    next_step="`lorac variants` lists them",
                )
        super().__post_init__()

    @classmethod
    def of(cls, *adapters: Adapter, name: str) -> Adapter:
        """Combine several adapters into one that applies them in order; the tensors are shared, not copied.

        Args:
            adapters: adapters of methods that edit weights.
            name: name of the result.

        Raises:
            CompileError: an adapter's method does not edit a weight.
            ChoiceError: two adapters replace the same parameter.
        """
        parts: list[WeightVariant] = []
        for adapter in adapters:
            adapter.variant.require_class()
            if not isinstance(adapter.variant, WeightVariant):
                raise unmergeable_error(
                    f"'{adapter.name}' ({adapter.variant.name}) does not edit a weight that the next method could use",
                    next_step="use methods of the weight form, which `lorac variants` lists",
                )
            own = _sites_pattern(adapter)
            parts.append(dataclasses.replace(adapter.variant, targets=own, exclude=(), layers=()))
        variant = cls(parts=tuple(parts), targets=_sites_pattern(*adapters))
        chained = Adapter(name, variant)
        for prefix, adapter in zip(variant.inner, adapters, strict=True):
            for path, tensors in adapter.tensors.items():
                renamed = {prefix + key: tensor for key, tensor in tensors.items()}
                chained.tensors.setdefault(path, {}).update(renamed)
            chained.join_replaced(adapter)
        return chained

    def at_path(self, path: str) -> Variant:
        return dataclasses.replace(self, parts=tuple(cast(WeightVariant, part.at_path(path)) for part in self.parts))

    def adapts(self, site: Site) -> bool:
        return bool(self.inner_sites(site))

    @property
    def inner(self) -> dict[str, WeightVariant]:
        return {f"part{index}_": part for index, part in enumerate(self.parts)}

    def inner_sites(self, site: Site) -> dict[str, Site]:
        return {prefix: site for prefix, part in self.inner.items() if _acts(part, site)}

    def inner_weight(self, prefix: str, context: InitContext) -> Tensor:
        """Return the weight that the parts before this part return."""
        return Chain(parts=self.parts[: list(self.inner).index(prefix)]).weight(context.weight(), context.params)

    def weight(self, W: Tensor, p: Params) -> Tensor:
        for part, own in self._with_tensors(p):
            W = part.weight(W, own)
        return W

    def compute_bias(self, W: Tensor, b: Tensor, p: Params) -> Tensor:
        for part, own in self._with_tensors(p):
            W, b = part.weight(W, own), part.compute_bias(W, b, own)
        return b

    def _with_tensors(self, p: Params) -> Iterator[tuple[WeightVariant, Params]]:
        """Yield the parts that act at this site, each with its tensors."""
        for prefix, part in self.inner.items():
            own = select_params(p, prefix)
            if vars(own):
                yield part, own


def _acts(part: WeightVariant, site: Site) -> bool:
    named = select_sites(
        {site.path: site},
        re.escape(site.path) if part.targets == Variant.targets else part.targets,
        exclude=part.exclude,
        layers=part.layers,
        layers_pattern=part.layers_pattern,
    )
    return bool(named) and part.adapts(site)


def _sites_pattern(*adapters: Adapter) -> str:
    """Return a regular expression that matches exactly these adapters' sites; suffixes might match more."""
    return "|".join(dict.fromkeys(re.escape(path) for adapter in adapters for path in adapter.tensors))
