"""Preconditioned gradients of two factors: the step of their product no longer depends on how it is factored.

Break-for-Make's second stage (ACM TOG 44(2), 2025), whose first form is arXiv 2403.19456; for LoRA: Zhang and Pilanci
2024, arXiv 2402.02347.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorac.errors import ChoiceError, Unavailable
from lorac.training.rule import Rule, TrainedTerm
from lorac.variants.base import Variant
from lorac.variants.lora import LoRA
from lorac.variants.plp import PLP

_NOTHING = 1e-6
"""A Gram matrix with at most this Frobenius norm counts as the identity: its factor starts at 0."""
_UP, _DOWN = ("up_frozen", "up_learned"), ("down_frozen", "down_learned")


class Preconditioned(Rule):
    """Before every step g_up ← g_up·(down·downᵀ + reg·I)⁻¹ and g_down ← (upᵀ·up + reg·I)⁻¹·g_down, (r, r) each.

    up (out, r) and down (r, in) are LoRA's B and A, or PLP's, whose frozen halves count in the Gram matrices and have
    no gradient. Both gradients change by the factors as they are before the step. Clipping comes before this.

    Args:
        compiled: as ``Rule``'s.
        optimizer: as ``Rule``'s; one optimizer holds both factors.
        reg: added to the diagonals; the paper's 0 needs factors of full rank, and a factor that starts at 0 is not
            after a first step on fewer tokens than r.

    Raises:
        Unavailable, AdapterNotFound: as ``Rule``; in a step, Unavailable where a Gram matrix has no inverse.
        ChoiceError: as ``Rule``; also where reg is negative or not finite.
    """

    methods: ClassVar[tuple[type[Variant], ...]] = (PLP, LoRA)
    governed: ClassVar[tuple[str, ...]] = ("up_learned", "down_learned", "lora_A", "lora_B")
    decides: ClassVar[frozenset[str]] = frozenset({"direction"})
    before_gradients = True

    def __init__(self, compiled: nn.Module, optimizer: Optimizer, *, reg: float = 0.0) -> None:
        super().__init__(compiled, optimizer)
        if not 0 <= reg < math.inf:
            raise ChoiceError(f"reg={reg} is out of range", next_step="give a finite number from 0 on")
        self.reg = reg
        self.attach()

    def before(self) -> None:
        """Change the gradients of every pair of factors."""
        for term in self.terms:
            self._change(term)

    def _change(self, term: TrainedTerm) -> None:
        own = term.tensors
        if "lora_A" in own:
            up, down = own["lora_B"], own["lora_A"]
            learned_up, learned_down = up, down
        else:
            up, down = torch.cat([own[name] for name in _UP]), torch.cat([own[name] for name in _DOWN], dim=1)
            learned_up, learned_down = own["up_learned"], own["down_learned"]
        if learned_up.grad is not None:
            changed = self._solve(down, learned_up.grad.t(), f"down·downᵀ of {term}")
            learned_up.grad.copy_(changed.t())
        if learned_down.grad is not None:
            learned_down.grad.copy_(self._solve(up.t(), learned_down.grad, f"upᵀ·up of {term}"))

    def _solve(self, factor: Tensor, grad: Tensor, what: str) -> Tensor:
        """(F·Fᵀ + reg·I)⁻¹·grad of a factor F (r, n) and a gradient (r, m), in float32 at least."""
        wide = factor.to(torch.promote_types(factor.dtype, torch.float32))
        gram = wide @ wide.t()
        if torch.linalg.matrix_norm(gram) <= _NOTHING:
            return grad
        gram.diagonal().add_(self.reg)
        lower, failed = torch.linalg.cholesky_ex(gram)
        # One that rounding alone keeps from failing would answer with noise.
        noise = len(gram) * torch.finfo(gram.dtype).eps * gram.diagonal().max()
        if failed or lower.diagonal().square().min() <= noise:
            raise Unavailable(
                f"{what} has no inverse: the factor is not of full rank, or not finite", next_step="give reg= above 0"
            )
        return torch.cholesky_solve(grad.to(gram.dtype), lower)
