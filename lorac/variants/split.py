"""Split: methods on parts of a layer that packs several into one, such as queries, keys and values.

What a part is called and how its rows lie is said by whoever knows the layer: GPT-2's ``c_attn``, timm's ``qkv`` and
Phi-3's ``qkv_proj`` have all rows of a part beside each other, GPT-NeoX's ``query_key_value`` those of a head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch

from lorac.errors import OptionError, SiteError, nearest_name
from lorac.ir.algebra.reduction import Params
from lorac.ir.sites import Site, SiteKind
from lorac.ir.slots.live_terms import Dropout
from lorac.variants.base import MATRIX_KINDS, Variant, WeightVariant
from lorac.variants.params import Init, InitContext, ParamSpec

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Split(WeightVariant):
    """``W' = [f₀(W₀); f₁(W₁); …]``, W cut by rows: fᵢ a method, or nothing; its tensors are called ``<part>_<name>``.

    Attributes:
        parts: name of a part -> the method that acts on its rows, as on a layer's weight. What that targets is not
            asked: the split's own ``targets`` count, and so does its own dropout.
        among: the names of all parts, in the order of the rows; where they are not of one size, name -> its share of
            the rows (its rows, or any numbers in the same proportion, such as its heads).
        groups: the rows are in so many groups, each of which is cut so (the heads of GPT-NeoX and Bloom, the groups of
            heads of Falcon).
        dropout: rate of the dropout on the branch's input, in training.
    """

    parts: Mapping[str, WeightVariant]
    among: tuple[str, ...] | Mapping[str, int] = ("q", "k", "v")
    groups: int = 1
    dropout: float = 0.0

    name: ClassVar[str] = "split"
    kinds: ClassVar[frozenset[SiteKind]] = MATRIX_KINDS
    dropout_place: ClassVar[Dropout] = Dropout.INPUT

    def __post_init__(self) -> None:
        super().__post_init__()
        for part, method in self.parts.items():
            if getattr(method, "dropout", 0):
                raise OptionError(
                    f"the method of part '{part}' has dropout={method.dropout}, of which a part has none of its own",  # type: ignore[attr-defined]  # it was asked
                    next_step="set the split's own dropout=",
                )
            if part not in self.among:
                raise OptionError(
                    f"there is no part '{part}'",
                    nearest=nearest_name(part, self.among) or ", ".join(self.among),
                    next_step="among= names all parts in the order of their rows",
                )

    def at(self, site: Site) -> Variant:
        here = {part: cast(WeightVariant, method.at(site)) for part, method in self.parts.items()}
        return dataclasses.replace(self, parts=here)

    def check(self, site: Site) -> None:
        super().check(site)
        if site.out_features % (self.groups * sum(self._shares.values())):
            parts = ", ".join(f"{part}: {share}" for part, share in self._shares.items())
            raise SiteError(
                f"the {site.out_features} rows of '{site.path}' are not {self.groups} times parts of {parts}",
                next_step="among= is the sizes of the parts, groups= how often they follow each other",
                code="site_unsupported",
            )
        for part, method in self.parts.items():
            method.check(self._part(part, site))

    def starts_as_base(self, site: Site) -> bool:
        return all(method.starts_as_base(self._part(part, site)) for part, method in self.parts.items())

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {
            f"{part}_{key}": dataclasses.replace(spec, init=self._init(part, spec.init, site))
            for part, method in self.parts.items()
            for key, spec in method.params(self._part(part, site)).items()
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        cut = self._cut(W)
        for part, method in self.parts.items():
            cut[part] = method.weight(cut[part], _split_params(p, part))
        return self._joined(cut)

    def new_bias(self, b: Tensor, p: Params) -> Tensor:
        cut = self._cut(b)
        changed = {part: method.new_bias(cut[part], _split_params(p, part)) for part, method in self.parts.items()}
        same = all(changed[part] is cut[part] for part in changed)
        return b if same else self._joined(cut | changed)

    @property
    def _shares(self) -> Mapping[str, int]:
        return self.among if isinstance(self.among, Mapping) else dict.fromkeys(self.among, 1)

    def _cut(self, whole: Tensor) -> dict[str, Tensor]:
        """The rows of each part of W (out, …), one group's after another's."""
        unit = whole.shape[0] // (self.groups * sum(self._shares.values()))
        groups = whole.unflatten(0, (self.groups, -1))
        pieces = groups.split([share * unit for share in self._shares.values()], 1)
        return {part: piece.flatten(0, 1) for part, piece in zip(self._shares, pieces, strict=True)}

    def _joined(self, cut: Mapping[str, Tensor]) -> Tensor:
        """The inverse of ``_cut``."""
        return torch.cat([cut[part].unflatten(0, (self.groups, -1)) for part in self._shares], 1).flatten(0, 1)

    def _part(self, part: str, site: Site) -> Site:
        """A part as a layer of its own."""
        rows = site.out_features * self._shares[part] // sum(self._shares.values())
        return dataclasses.replace(site, out_features=rows)

    def _init(self, part: str, init: Init, site: Site) -> Init:
        """A part's initialiser, which sees its own tensors and its own rows of the weight."""
        here = self._part(part, site)

        def made(context: InitContext) -> Tensor:
            def weight() -> Tensor:
                return self._cut(context.weight())[part]

            return init(
                dataclasses.replace(context, site=here, params=_split_params(context.params, part), weight=weight)
            )

        return made


def _split_params(p: Params, part: str) -> Params:
    """The tensors of one part, by the names that its method gives them."""
    start = f"{part}_"
    return Params(**{key.removeprefix(start): value for key, value in vars(p).items() if key.startswith(start)})
