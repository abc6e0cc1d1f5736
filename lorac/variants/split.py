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
from lorac.variants._composite import CompositeVariant
from lorac.variants.base import MATRIX_KINDS, InitContext, Params, Site, Tensor, Variant, WeightVariant
from lorac.variants.low_rank import InputDropout
from lorac.variants.params import select_params


@dataclass(frozen=True, kw_only=True)
class Split(InputDropout, CompositeVariant):
    """``W' = [f₀(W₀); f₁(W₁); …]``: W is split by rows, fᵢ is a method or the identity. Tensors are ``<part>_<name>``.

    Attributes:
        parts: name of a part -> the method that acts on its rows, as on a layer's weight. The split's ``targets`` and
            ``dropout`` apply, not the method's.
        among: the names of all parts, in the order of the rows; for unequal parts, name -> share of the rows (a number
            of rows, or numbers in the same proportion, such as heads).
        groups: number of groups of rows, each split in the same way (the heads of GPT-NeoX and Bloom, the groups of
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
                    next_step="give all parts in among=, in the order of their rows",
                )

    def at_path(self, path: str) -> Variant:
        parts = {part: cast(WeightVariant, method.at_path(path)) for part, method in self.parts.items()}
        return dataclasses.replace(self, parts=parts)

    @property
    def inner(self) -> dict[str, WeightVariant]:
        return {f"{part}_": method for part, method in self.parts.items()}

    def inner_sites(self, site: Site) -> dict[str, Site]:
        """Return the site of each part, as if the part were a separate layer."""
        units, rest = divmod(site.out_features, self.groups * sum(self._shares.values()))
        if rest:
            parts = ", ".join(f"{part}: {share}" for part, share in self._shares.items())
            raise SiteError(
                f"the {site.out_features} rows of '{site.path}' do not divide into {self.groups} groups of {parts}",
                next_step="give the sizes of the parts in among=, and the number of groups in groups=",
            )
        rows = {part: units * self.groups * self._shares[part] for part in self.parts}
        return {f"{part}_": dataclasses.replace(site, out_features=count) for part, count in rows.items()}

    def inner_weight(self, prefix: str, context: InitContext) -> Tensor:
        return self._split_rows(context.weight())[prefix.removesuffix("_")]

    def weight(self, W: Tensor, p: Params) -> Tensor:
        rows = self._split_rows(W)
        for part, method in self.parts.items():
            rows[part] = method.weight(rows[part], select_params(p, f"{part}_"))
        return self._join_rows(rows)

    def compute_bias(self, W: Tensor, b: Tensor, p: Params) -> Tensor:
        rows, weights = self._split_rows(b), self._split_rows(W)
        changed = dict(rows)
        for part, method in self.parts.items():
            changed[part] = method.compute_bias(weights[part], rows[part], select_params(p, f"{part}_"))
        return b if all(changed[part] is rows[part] for part in rows) else self._join_rows(changed)

    @property
    def _shares(self) -> Mapping[str, int]:
        return self.among if isinstance(self.among, Mapping) else dict.fromkeys(self.among, 1)

    def _split_rows(self, fused: Tensor) -> dict[str, Tensor]:
        """Split a tensor (out, …) into the rows of each part, concatenated over the groups."""
        unit = fused.shape[0] // (self.groups * sum(self._shares.values()))
        groups = fused.unflatten(0, (self.groups, -1))
        parts = groups.split([share * unit for share in self._shares.values()], 1)
        return {name: part.flatten(0, 1) for name, part in zip(self._shares, parts, strict=True)}

    def _join_rows(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Join rows that ``_split_rows`` split."""
        return torch.cat([rows[part].unflatten(0, (self.groups, -1)) for part in self._shares], 1).flatten(0, 1)
