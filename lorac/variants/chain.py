"""Chain: methods in sequence, each on the weight that the previous one returns.

Adapters that are active together are summed, each as a change of the base's own weight, in any order. PEFT applies
those of some types (BAT, OFT, BOFT, HRA) on top of each other; ``Chain.of`` joins such adapters into one.
"""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from lorac.errors import ChoiceError, CompileError, OptionError
from lorac.ir.patterns import select_sites
from lorac.variants.adapter import Adapter
from lorac.variants.base import (
    Init,
    InitContext,
    Params,
    ParamSpec,
    Site,
    Tensor,
    Variant,
    WeightVariant,
    constrained_parts,
)
from lorac.variants.params import select_params


@dataclass(frozen=True, kw_only=True)
class Chain(WeightVariant):
    """``W' = fₙ(… f₂(f₁(W)))``, fᵢ the formula of the i-th part; its tensors are called ``part<i>_<name>``, from 0.

    Attributes:
        parts: the methods, in order. Those act at a site whose own ``targets`` (by default all of the chain's),
            ``exclude`` and ``layers`` select it. Their dropout is not applied, since dropout belongs to a whole term.
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
        """Return one adapter that applies several in order; it shares their tensors without copies.

        Args:
            adapters: adapters of methods that edit weights.
            name: name of the result.

        Raises:
            CompileError: the method of one of them does not edit a weight.
            ChoiceError: two of them replace the same parameter whole.
        """
        chained = Adapter(name, cls(parts=tuple(map(_restrict_to_sites, adapters)), targets=_sites_pattern(*adapters)))
        for index, adapter in enumerate(adapters):
            for path, tensors in adapter.tensors.items():
                renamed = {_part_prefix(index) + key: tensor for key, tensor in tensors.items()}
                chained.tensors.setdefault(path, {}).update(renamed)
            conflicts = chained.replaced.keys() & adapter.replaced.keys()
            if conflicts:
                raise ChoiceError(
                    f"'{adapter.name}' replaces '{min(conflicts)}', and so does an adapter before it",
                    next_step="only one adapter of a chain may replace a parameter",
                )
            chained.replaced |= adapter.replaced
        return chained

    def at(self, site: Site) -> Variant:
        return dataclasses.replace(self, parts=tuple(cast(WeightVariant, part.at(site)) for part in self.parts))

    def adapts(self, site: Site) -> bool:
        return next(self._acting(site), None) is not None

    def starts_as_base(self, site: Site) -> bool:
        return all(part.starts_as_base(site) for _, part in self._acting(site))

    def check(self, site: Site) -> None:
        super().check(site)
        for _, part in self._acting(site):
            part.check(site)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {
            _part_prefix(index) + key: dataclasses.replace(spec, init=_part_init(index, self.parts[:index], spec.init))
            for index, part in self._acting(site)
            for key, spec in part.params(site).items()
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        for part, own in self._with_tensors(p):
            W = part.weight(W, own)
        return W

    def new_bias(self, b: Tensor, p: Params) -> Tensor:
        for part, own in self._with_tensors(p):
            b = part.new_bias(b, own)
        return b

    def constrained(self, p: Params) -> dict[str, Tensor]:
        return constrained_parts({_part_prefix(index): part for index, part in enumerate(self.parts)}, p)

    def _with_tensors(self, p: Params) -> Iterator[tuple[WeightVariant, Params]]:
        """Yield the parts that act here, each with its own tensors."""
        for index, part in enumerate(self.parts):
            own = select_params(p, _part_prefix(index))
            if vars(own):
                yield part, own

    def _acting(self, site: Site) -> Iterator[tuple[int, WeightVariant]]:
        for index, part in enumerate(self.parts):
            named = select_sites(
                {site.path: site},
                re.escape(site.path) if part.targets == Variant.targets else part.targets,
                exclude=part.exclude,
                layers=part.layers,
                layers_pattern=part.layers_pattern,
            )
            if named and part.adapts(site):
                yield index, part


def _part_prefix(index: int) -> str:
    return f"part{index}_"


def _part_init(index: int, before: tuple[WeightVariant, ...], init: Init) -> Init:
    """Return a part's initialiser, which reads its own tensors and the weight that earlier parts return."""

    def initialise(context: InitContext) -> Tensor:
        def weight() -> Tensor:
            return Chain(parts=before).weight(context.weight(), context.params)

        own = select_params(context.params, _part_prefix(index))
        return init(dataclasses.replace(context, params=own, weight=weight))

    return initialise


def _restrict_to_sites(adapter: Adapter) -> WeightVariant:
    adapter.variant.require_class()
    if not isinstance(adapter.variant, WeightVariant):
        raise CompileError(
            f"'{adapter.name}' ({adapter.variant.name}) does not edit a weight that the next method could use",
            next_step="a chain takes methods of the weight form; `lorac variants` lists them",
            code="not_mergeable",
        )
    return dataclasses.replace(adapter.variant, targets=_sites_pattern(adapter), exclude=(), layers=())


def _sites_pattern(*adapters: Adapter) -> str:
    """Return a regular expression that matches exactly these adapters' sites, which suffixes may not."""
    return "|".join(dict.fromkeys(re.escape(path) for adapter in adapters for path in adapter.tensors))
