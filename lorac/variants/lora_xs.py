"""LoRA-XS: an r x r core between two frozen factors of the weight, or (LoRA-SB) of an estimated update.

Bałazy, Banaei et al. 2024, arXiv 2405.17604; Ponkshe, Singhal et al. 2024 (LoRA-SB), arXiv 2411.19557.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lorac.argument_types import Count
from lorac.errors import shape_error
from lorac.variants._decompositions import require_rank
from lorac.variants.adapter import Adapter
from lorac.variants.base import Params, ParamSpec, Role, Site, Tensor, WeightVariant
from lorac.variants.initialisers import normal
from lorac.variants.low_rank import InputDropout

_EXACT = 512
"""Up to this size of a weight's smaller side the full SVD is computed."""
_ROUNDS, _SPARE = 10, 10
"""Number of rounds, and of extra columns, of the randomised SVD."""


def _singular_vectors(W: Tensor, r: int, generator: torch.Generator) -> Tensor:
    """Return U_r (out, r), the first left singular vectors of W; signs make the largest entry of each positive."""
    if min(W.shape) <= max(_EXACT, 4 * r):
        vectors = torch.linalg.svd(W, full_matrices=False).U[:, :r]
    else:  # subspace iteration from random columns
        columns = torch.randn(W.shape[1], r + _SPARE, generator=generator).to(W)
        for _ in range(_ROUNDS):
            columns = W.t() @ torch.linalg.qr(W @ columns).Q
        basis = torch.linalg.qr(W @ columns).Q
        vectors = (basis @ torch.linalg.svd(basis.t() @ W, full_matrices=False).U)[:, :r]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()


@dataclass(frozen=True, kw_only=True)
class LoRAXS(InputDropout, WeightVariant):
    """``W' = W + (alpha/r)·B·R·A``, R (r, r) trained, B = U_r and A = Σ_r·V_rᵀ frozen, of the truncated SVD of W.

    Attributes:
        r: rank, at most min(out, in).
        alpha: the scale is alpha/r.
    """

    r: Count = 32
    alpha: float = 32

    name = "loraxs"
    paper = "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters, arXiv 2405.17604"
    identity_at_init = False

    @classmethod
    def from_update(
        cls, updates: Mapping[str, Tensor], *, name: str, r: int = 32, alpha: float | None = None
    ) -> Adapter:
        """Make a LoRA-SB adapter, whose core starts as the best rank-r approximation of full fine-tuning's first step.

        B = U_r, A = V_rᵀ and R = diag(σ)·r/alpha from the update's SVD, so that W' differs from W at the start, by
        design. For AdamW the first step is −η·sign(G), η its first learning rate and G the gradient summed over some
        batches.

        Args:
            updates: path of a site -> estimated update of its weight (out, in).
            r: rank, at most min(out, in) of every site.
            alpha: default: r, as in the paper.

        Raises:
            AdapterError: an update is not a matrix with both sides at least r.
        """
        variant = cls(r=r, alpha=r if alpha is None else alpha, targets=tuple(updates))
        generator = torch.Generator().manual_seed(0)
        adapter = Adapter(name, variant)
        for path, update in updates.items():
            if update.ndim != 2 or min(update.shape) < r:
                raise shape_error(
                    f"the update of '{path}' has the shape {list(update.shape)}, and fewer than {r} singular vectors",
                    next_step="give a matrix (out, in) of the shape that formulas see, or a smaller r",
                )
            left = _singular_vectors(update, r, generator)
            right = left.t() @ update
            norms = torch.linalg.vector_norm(right, dim=1)
            adapter.tensors[path] = {
                "lora_B": left.contiguous(),
                "lora_A": (right / norms.clamp_min(torch.finfo(update.dtype).tiny)[:, None]).contiguous(),
                "lora_latent": torch.diag(norms * r / variant.alpha),
            }
        return adapter

    def check(self, site: Site) -> None:
        super().check(site)
        require_rank("LoRA-XS", self.r, site)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        r, frozen = self.r, Role.FROZEN
        return {
            "lora_B": ParamSpec(
                (site.out_features, r), lambda c: _singular_vectors(c.weight(), r, c.generator), role=frozen
            ),
            "lora_A": ParamSpec(
                (r, site.in_features), lambda c: c.params.lora_B.t() @ c.weight(), role=frozen
            ),  # U_rᵀ·W
            "lora_latent": ParamSpec((r, r), normal(1e-5), decay=False),
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        return W + self.alpha / self.r * ((p.lora_B @ p.lora_latent) @ p.lora_A)
