"""Partly learnable projections: a LoRA in which half of each factor is a frozen orthonormal basis.

Break-for-Make, 2024, arXiv 2403.19456: the content learns half of the down factor, the style half of the up factor.
"""

from dataclasses import dataclass
from typing import Annotated

import torch

from lorac.argument_types import Count, OneOf
from lorac.errors import ChoiceError, missing_site_error
from lorac.variants.adapter import Adapter
from lorac.variants.base import Init, InitContext, Params, ParamSpec, Role, Site, Tensor, Variant, WeightVariant
from lorac.variants.initialisers import normal, zeros

_ROWS = 1280
"""Rows of the orthonormal matrix from which the paper's code draws at any width: the largest width of SDXL's U-Net."""
UP, DOWN = 0, 1


def _settings_key(variant: Variant) -> tuple[object, ...]:
    """Return the settings that two halves must share."""
    return tuple(getattr(variant, field, None) for field in ("r", "basis", "identity_init"))


@dataclass(frozen=True, kw_only=True)
class PLP(WeightVariant):
    """``W' = W + [A; E]·[C, D]`` with frozen A (out/2, r) and C (r, in/2), and trained E (rows) and D (columns).

    Attributes:
        r: rank.
        basis: A and C at square sites: ``"rows"``, disjoint rows of one matrix with orthonormal columns (the
            paper's code: A·C is small, not 0); ``"exact"``, such rows over disjoint halves of the rank, A·C = 0;
            ``"none"``, A = 0 and C Gaussian, as at all other sites.
        identity_init: whether to subtract A·C and start D at 0 at square sites. Without it a fresh adapter changes a
            square site, as in the code; with it the low-rank form has rank 2r.
    """

    r: Count = 64
    basis: Annotated[str, OneOf(("rows", "exact", "none"))] = "rows"
    identity_init: bool = False

    name = "plp"
    paper = "Break-for-Make: Modular Low-Rank Adaptations for Composable Content-Style Customization, arXiv 2403.19456"

    def starts_as_base(self, site: Site) -> bool:
        return site.out_features != site.in_features or self.basis != "rows" or self.identity_init

    def params(self, site: Site) -> dict[str, ParamSpec]:
        out, columns, r = site.out_features, site.in_features, self.r
        top, left = out // 2, columns // 2
        based = out == columns and self.basis != "none"
        gaussian = normal(1 / r)
        learned = zeros if based and self.identity_init else gaussian
        return {
            "up_frozen": ParamSpec((top, r), self._basis(UP) if based else zeros, role=Role.FROZEN),
            "up_learned": ParamSpec((out - top, r), zeros),
            "down_frozen": ParamSpec((r, left), self._basis(DOWN) if based else gaussian, role=Role.FROZEN),
            "down_learned": ParamSpec((r, columns - left), learned),
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        up, down = torch.cat([p.up_frozen, p.up_learned]), torch.cat([p.down_frozen, p.down_learned], dim=1)
        adapted = W + up @ down
        if not (self.identity_init and self.basis == "rows" and len(W) == W.shape[1]):
            return adapted  # A·C is 0, or is kept
        frozen_up = torch.cat([p.up_frozen, torch.zeros_like(p.up_learned)])
        frozen_down = torch.cat([p.down_frozen, torch.zeros_like(p.down_learned)], dim=1)
        return adapted - frozen_up @ frozen_down

    @classmethod
    def join(cls, content: Adapter, style: Adapter, *, name: str) -> Adapter:
        """Combine two halves: the style's tensors with the trained part of the content's down factor (paper: "make").

        The halves fit if both were trained with the same frozen parts; otherwise train the result further.

        Args:
            content: an adapter; its tensors are shared, not copied.
            style: an adapter of the same configuration on the same sites; its tensors are shared too.
            name: name of the result.

        Raises:
            ChoiceError: an adapter has another method, rank or basis.
            SiteError: only one of the two adapts a site.
        """
        for adapter in (content, style):
            if not isinstance(adapter.variant, cls) or _settings_key(adapter.variant) != _settings_key(style.variant):
                raise ChoiceError(
                    f"'{adapter.name}' ({adapter.variant.name} {_settings_key(adapter.variant)}) does not fit "
                    f"'{style.name}'",
                    next_step="give plp adapters of equal r, basis and identity_init",
                )
        different = content.tensors.keys() ^ style.tensors.keys()
        if different:
            raise missing_site_error(
                f"'{content.name}' and '{style.name}' do not both adapt '{min(different)}'",
                next_step="train both halves with the same targets=",
            )
        tensors = {
            path: {**own, "down_learned": content.tensors[path]["down_learned"]} for path, own in style.tensors.items()
        }
        return Adapter(name, style.variant, tensors, {**content.replaced, **style.replaced})

    def _basis(self, half: int) -> Init:
        """Return an initialiser of the frozen half of one factor, from the basis that both factors share."""

        def draw(context: InitContext) -> Tensor:
            # Two disjoint sets (n/2, r) of rows of one matrix with orthonormal columns, the same at every call.
            count = context.site.in_features // 2
            generator = torch.Generator().manual_seed(context.generator.initial_seed() + 1)
            number = max(_ROWS, 2 * count, self.r)
            basis = torch.linalg.qr(torch.randn(number, self.r, generator=generator)).Q
            rows = basis[torch.randperm(number, generator=generator)[half * count :][:count]]
            if self.basis == "exact":
                first = torch.arange(self.r) < self.r // 2
                rows = rows * (first if half == UP else ~first)
            return rows if half == UP else rows.t()

        return draw
