"""Split: methods on parts of a fused projection, such as queries, keys and values.

The caller names the parts and the order of their rows: GPT-2's ``c_attn``, timm's ``qkv`` and Phi-3's ``qkv_proj``
store all rows of a part together, GPT-NeoX's ``query_key_value`` stores them per head.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch

from lorac.argument_types import Count
from lorac.errors import OptionError, SiteError, nearest_name
from lorac.variants.base import (
    MATRIX_KINDS,
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
from lorac.variants.low_rank import InputDropout
from lorac.variants.params import select_params


@dataclass(frozen=True, kw_only=True)
class Split(InputDropout, WeightVariant):
    """``W' = [f₀(W₀); f₁(W₁); …]``, W split by rows, fᵢ a method or the identity. Tensors are ``<part>_<name>``.

    Attributes:
        parts: name of a part -> the method that acts on its rows, as on a layer's weight. The split's own ``targets``
            and ``dropout`` apply, not the method's.
        among: the names of all parts, in the order of the rows; for unequal parts, name -> its share of the rows (the
            number of rows, or any numbers in the same proportion, such as heads).
        groups: number of groups of rows, each of which is split alike (the heads of GPT-NeoX and Bloom, the groups of
            heads of Falcon).
    """

    parts: Mapping[str, WeightVariant]
    among: tuple[str, ...] | Mapping[str, int] = ("q", "k", "v")
    groups: Count = 1

    name = "split"
    kinds = MATRIX_KINDS

    def __post_init__(self) -> None:
        super().__post_init__()
        for part, method in self.parts.items():
            dropout = getattr(method, "dropout", 0.0)
            if dropout:
                raise OptionError(
                    f"the method of part '{part}' has dropout={dropout}, which a part cannot have",
                    next_step="set the split's own dropout=",
                )
            if part not in self.among:
                raise OptionError(
                    f"there is no part '{part}'",
                    nearest=nearest_name(part, self.among) or ", ".join(self.among),
                    next_step="among= names all parts in the order of their rows",
                )

    def at(self, site: Site) -> Variant:
        parts = {part: cast(WeightVariant, method.at(site)) for part, method in self.parts.items()}
        return dataclasses.replace(self, parts=parts)

    def check(self, site: Site) -> None:
        super().check(site)
        if site.out_features % (self.groups * sum(self._shares.values())):
            parts = ", ".join(f"{part}: {share}" for part, share in self._shares.items())
            raise SiteError(
                f"the {site.out_features} rows of '{site.path}' do not divide into {self.groups} groups of {parts}",
                next_step="give the sizes of the parts in among=, and the number of groups in groups=",
            )
        for part, method in self.parts.items():
            method.check(self._part_site(part, site))

    def starts_as_base(self, site: Site) -> bool:
        return all(method.starts_as_base(self._part_site(part, site)) for part, method in self.parts.items())

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {
            f"{part}_{key}": dataclasses.replace(spec, init=self._init(part, spec.init, site))
            for part, method in self.parts.items()
            for key, spec in method.params(self._part_site(part, site)).items()
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        rows = self._split_rows(W)
        for part, method in self.parts.items():
            rows[part] = method.weight(rows[part], select_params(p, f"{part}_"))
        return self._join_rows(rows)

    def new_bias(self, b: Tensor, p: Params) -> Tensor:
        rows = self._split_rows(b)
        changed = dict(rows)
        for part, method in self.parts.items():
            changed[part] = method.new_bias(rows[part], select_params(p, f"{part}_"))
        unchanged = all(changed[part] is rows[part] for part in rows)
        return b if unchanged else self._join_rows(changed)

    def constrained(self, p: Params) -> dict[str, Tensor]:
        return constrained_parts({f"{part}_": method for part, method in self.parts.items()}, p)

    @property
    def _shares(self) -> Mapping[str, int]:
        return self.among if isinstance(self.among, Mapping) else dict.fromkeys(self.among, 1)

    def _split_rows(self, fused: Tensor) -> dict[str, Tensor]:
        """Return the rows of each part of a tensor (out, …), group after group."""
        unit = fused.shape[0] // (self.groups * sum(self._shares.values()))
        groups = fused.unflatten(0, (self.groups, -1))
        parts = groups.split([share * unit for share in self._shares.values()], 1)
        return {name: part.flatten(0, 1) for name, part in zip(self._shares, parts, strict=True)}

    def _join_rows(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Invert ``_split_rows``."""
        return torch.cat([rows[part].unflatten(0, (self.groups, -1)) for part in self._shares], 1).flatten(0, 1)

    def _part_site(self, part: str, site: Site) -> Site:
        """Return the site that a part would be as a layer of its own."""
        rows = site.out_features * self._shares[part] // sum(self._shares.values())
        return dataclasses.replace(site, out_features=rows)

    def _init(self, part: str, init: Init, site: Site) -> Init:
        """Return a part's initialiser, which reads its own tensors and its own rows of the weight."""
        part_site = self._part_site(part, site)

        def initialise(context: InitContext) -> Tensor:
            def weight() -> Tensor:
                return self._split_rows(context.weight())[part]

            own = select_params(context.params, f"{part}_")
            return init(dataclasses.replace(context, site=part_site, params=own, weight=weight))

        return initialise
