"""Chain: methods one after the other, each on the weight that the one before left.

Adapters that are active together are summed, each as a change of the base's own weight, whatever their order. PEFT
applies those of some types (BAT, OFT, BOFT, HRA) one on top of the other; ``Chain.of`` joins such adapters into one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, cast

import torch

from lorac.errors import ChoiceError, CompileError, OptionError
from lorac.ir.algebra.reduction import Params
from lorac.ir.patterns import select_sites
from lorac.ir.sites import Site
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant, WeightVariant
from lorac.variants.params import Init, InitContext, ParamSpec

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Chain(WeightVariant):
    """``W' = fₙ(… f₂(f₁(W)))``, fᵢ the formula of the i-th part; its tensors are called ``part<i>_<name>``, from 0.

    Attributes:
        parts: the methods, in order. At a site act those whose own ``targets`` (left at its default: all that the
            chain's name), ``exclude`` and ``layers`` name it. Their dropout is not applied: it belongs to a term as a
            whole.
    """

    parts: tuple[WeightVariant, ...]

    name: ClassVar[str] = "chain"

    def __post_init__(self) -> None:
        for part in self.parts if isinstance(self.parts, list | tuple) else ():
            if not isinstance(part, WeightVariant):
                raise OptionError(
                    f"a chain is made of methods that edit weights, which {part!r} is not",
                    next_step="`lorac variants` lists them",
                )
        super().__post_init__()

    @classmethod
    def of(cls, *adapters: Adapter, name: str) -> Adapter:
        """One adapter that applies these in order; tensors are shared with them, not copied.

        Args:
            adapters: adapters of methods that edit weights.
            name: of the result.

        Raises:
            CompileError: one of them is of a method that does not edit a weight.
            ChoiceError: two of them replace the same parameter whole.
        """
        chained = Adapter(name, cls(parts=tuple(map(_restrict_to_sites, adapters)), targets=_sites_pattern(*adapters)))
        for index, adapter in enumerate(adapters):
            for path, tensors in adapter.tensors.items():
                here = chained.tensors.setdefault(path, {})
                here |= {_part_prefix(index) + key: tensor for key, tensor in tensors.items()}
            twice = chained.replaced.keys() & adapter.replaced.keys()
            if twice:
                raise ChoiceError(
                    f"'{adapter.name}' replaces '{min(twice)}', and so does an adapter before it",
                    next_step="a chain holds one copy of a parameter that is replaced whole",
                )
            chained.replaced |= adapter.replaced
        return chained

    def at(self, site: Site) -> Variant:
        return dataclasses.replace(self, parts=tuple(cast(WeightVariant, part.at(site)) for part in self.parts))

    def adapts(self, site: Site) -> bool:
        return next(self._acting(site), None) is not None

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

    def _with_tensors(self, p: Params) -> Iterator[tuple[WeightVariant, Params]]:
        """The parts that act here, each with its own tensors."""
        for index, part in enumerate(self.parts):
            own = _part_params(p, index)
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


def _part_params(p: Params, index: int) -> Params:
    """The tensors of one part, by the names it gives them."""
    start = _part_prefix(index)
    return Params(**{key.removeprefix(start): value for key, value in vars(p).items() if key.startswith(start)})


def _part_init(index: int, before: tuple[WeightVariant, ...], init: Init) -> Init:
    """A part's initialiser, which sees its own tensors and the weight that the parts before it leave."""

    def made(context: InitContext) -> Tensor:
        def weight() -> Tensor:
            return Chain(parts=before).weight(context.weight(), context.params)

        return init(dataclasses.replace(context, params=_part_params(context.params, index), weight=weight))

    return made


def _restrict_to_sites(adapter: Adapter) -> WeightVariant:
    adapter.variant.require_class()
    if not isinstance(adapter.variant, WeightVariant):
        raise CompileError(
            f"'{adapter.name}' ({adapter.variant.name}) edits no weight that another method could go on with",
            next_step="a chain takes methods of the weight form; `lorac variants` lists them",
            code="not_mergeable",
        )
    return dataclasses.replace(adapter.variant, targets=_sites_pattern(adapter), exclude=(), layers=())


def _sites_pattern(*adapters: Adapter) -> str:
    """An expression that names these adapters' sites and no others, as a suffix might."""
    return "|".join(dict.fromkeys(re.escape(path) for adapter in adapters for path in adapter.tensors))
