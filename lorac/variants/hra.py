"""HRA: a chain of Householder reflections on a layer's input.

Yuan et al. 2024, arXiv 2405.17484.
"""

import dataclasses
from dataclasses import dataclass

import torch

from lorac.argument_types import Count
from lorac.errors import SiteError
from lorac.variants.base import MATRIX_KINDS, InitContext, Params, ParamSpec, Site, SiteKind, Tensor, WeightVariant
from lorac.variants.initialisers import kaiming_uniform


def _pairs(context: InitContext) -> Tensor:
    """Make columns 2j and 2j + 1 equal, so that each pair of reflections is the identity."""
    rows, columns = context.shape
    half = kaiming_uniform(dataclasses.replace(context, shape=(rows, columns // 2)))
    return half.repeat_interleave(2, dim=1)


@dataclass(frozen=True, kw_only=True)
class HRA(WeightVariant):
    """``W' = W·H₀·H₁ ⋯ H_{r−1}`` with ``Hᵢ = I − 2·uᵢ·uᵢᵀ``, uᵢ the normalised columns of hra_u (in, r).

    In compact WY form the product is ``I − U·T·Uᵀ``, ``T⁻¹ = I/2 + triu(Uᵀ·U, 1)``: rank r. With ``apply_GS`` the
    columns are made orthonormal first, and it is ``I − 2·Q·Qᵀ``, a reflection in their span.

    Attributes:
        r: number of reflections.
        apply_GS: whether the columns are made orthonormal (PEFT's name). Their start values are then independent, since
            equal pairs would span half the space.
    """

    r: Count = 8
    apply_GS: bool = False

    name = "hra"
    paper = (
        "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation, "
        "arXiv 2405.17484"
    )
    kinds = MATRIX_KINDS - {SiteKind.EMBEDDING}

    @property
    def identity_at_init(self) -> bool:  # type: ignore[override]  # it depends on the rank
        """False for an odd number of reflections, and for one reflection in a span: neither is the identity."""
        return self.r % 2 == 0 and not self.apply_GS

    def check(self, site: Site) -> None:
        super().check(site)
        if self.apply_GS and self.r > site.in_features:
            raise SiteError(
                f"HRA cannot make {self.r} orthonormal columns in the {site.in_features} dimensions of '{site.path}'",
                next_step=f"give r={site.in_features} or less, or leave apply_GS off",
            )

    def params(self, site: Site) -> dict[str, ParamSpec]:
        init = _pairs if self.identity_at_init else kaiming_uniform
        return {"hra_u": ParamSpec((site.in_features, self.r), init)}

    def weight(self, W: Tensor, p: Params) -> Tensor:
        if self.apply_GS:
            # QR and Gram-Schmidt give the same span, and only the span matters.
            q = torch.linalg.qr(p.hra_u).Q
            return W - (W @ (2 * q)) @ q.t()
        u = p.hra_u / torch.linalg.vector_norm(p.hra_u, dim=0)
        eye = torch.eye(self.r, dtype=u.dtype, device=u.device)
        t = torch.linalg.solve_triangular(0.5 * eye + torch.triu(u.t() @ u, 1), eye, upper=True)
        return W - (W @ (u @ t)) @ u.t()
