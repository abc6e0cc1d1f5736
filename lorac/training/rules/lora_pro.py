"""LoRA-Pro: gradients of both factors that move the weight as full fine-tuning would.

Wang et al., ICLR 2025, arXiv 2407.18242.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorac.training.rule import State
from lorac.training.rules.pairs import (
    BELOW_1,
    FROM_0,
    Gram,
    Pair,
    PairRule,
    check_plain_sgd,
    check_saved_state,
    check_settings,
    copy_state,
)


class LoRAPro(PairRule):
    """Gradients (g_A, g_B), replaced before a step by the nearest of the pairs that move W nearest to −∂L/∂W.

    With s = alpha/r (alpha/√r under rsLoRA), P the projector on the columns of B, and δ the damping of both Grams:

        g^A = (BᵀB)⁻¹·g_A/s² + X·A
        g^B = (1 − P)·g_B·(AAᵀ)⁻¹/s² − B·X,  (BᵀB)·X + X·(AAᵀ) = −(BᵀB)⁻¹·g_A·Aᵀ/s²

    With torch's SGD this is the paper's SGD form; with any other optimizer its *efficient* form, whose moments are of
    the factors' size. ``full`` is its AdamW: the moments are of the whole weight's size, (out, in) twice at every site,
    the direction they give is projected back on the factors, and the optimizer is plain SGD, whose weight decay is the
    decoupled one. The optimizer's other tensors then get AdamW's direction, too. Clipping, where there is any, comes
    before the step and measures the raw gradients.

    Args:
        compiled: as ``Rule``'s.
        optimizer: as ``Rule``'s; one optimizer holds both factors.
        full: AdamW with moments of the weight's size.
        damping: δ.
        betas: of the moments, with ``full``.
        eps: of their root, with ``full``.

    Raises:
        Unavailable, AdapterNotFound: as ``Rule``.
        ChoiceError: as ``Rule``; one factor trains without the other; a setting is out of range; with ``full`` the
            optimizer is not plain SGD.
    """

    decides: ClassVar[frozenset[str]] = frozenset({"direction", "rate", "factors"})
    saved: ClassVar[str] = "lora_pro"
    before_gradients = True

    def __init__(
        self,
        compiled: nn.Module,
        optimizer: Optimizer,
        *,
        full: bool = False,
        damping: float = 1e-8,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(compiled, optimizer)
        name = type(self).__name__
        check_settings(
            name, damping=(damping, FROM_0), beta1=(betas[0], BELOW_1), beta2=(betas[1], BELOW_1), eps=(eps, FROM_0)
        )
        if full:
            check_plain_sgd(self.optimizer, f"{name}(full=True)")
        self.full, self.damping = full, damping
        self._betas, self._eps = betas, eps
        paired = {id(tensor) for pair in self.pairs for tensor in pair.factors}
        tensors = [tensor for group in self.optimizer.param_groups for tensor in group["params"]]
        self._others = [tensor for tensor in tensors if id(tensor) not in paired] if full else []
        self._moments: list[State] = [{} for _ in (*self.pairs, *self._others)] if full else []
        self.attach()

    def before(self) -> None:
        """Change the gradients of every pair of factors."""
        for index, pair in enumerate(self.pairs):
            if any(tensor.grad is not None for tensor in pair.factors):  # else its adapter is not active
                self._change(index, pair)
        for index, tensor in enumerate(self._others, len(self.pairs)):
            if tensor.grad is not None:
                tensor.grad = self._adam(index, tensor.grad).to(tensor.dtype)

    def state(self) -> State:
        return {"moments": [dict(moments) for moments in self._moments]}

    def load_state(self, state: State) -> None:
        check_saved_state(type(self).__name__, state["moments"], self._moments)
        like = [*(pair.a for pair in self.pairs), *self._others] if self.full else []
        self._moments = [copy_state(own, tensor) for own, tensor in zip(state["moments"], like, strict=True)]

    def _change(self, index: int, pair: Pair) -> None:
        grad_a, grad_b = (
            tensor.grad if tensor.grad is not None else torch.zeros_like(tensor) for tensor in pair.factors
        )
        if self.full:
            moved = find_equivalent_gradients(pair, self.damping, grad_a, grad_b)
            a, b = (tensor.to(moved[0].dtype) for tensor in pair.factors)
            direction = self._adam(index, pair.scale * (b @ moved[0] + moved[1] @ a))
            grad_a, grad_b = pair.scale * b.mT @ direction, pair.scale * direction @ a.mT
        made = find_equivalent_gradients(pair, self.damping, grad_a, grad_b, nearest=True)
        for tensor, grad in zip(pair.factors, made, strict=True):
            tensor.grad = grad.to(tensor.dtype)

    def _adam(self, index: int, grad: Tensor) -> Tensor:
        """Return Adam's direction for one gradient, with moments in float32 at least."""
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        own = self._moments[index]
        if not own:
            own.update(step=0, mean=torch.zeros_like(wide), square=torch.zeros_like(wide))
        own["step"] += 1
        own["mean"].lerp_(wide, 1 - self._betas[0])
        own["square"].mul_(self._betas[1]).addcmul_(wide, wide, value=1 - self._betas[1])
        mean, square = (
            own[name] / (1 - beta ** own["step"]) for name, beta in zip(("mean", "square"), self._betas, strict=True)
        )
        return mean / (square.sqrt() + self._eps)


def find_equivalent_gradients(
    pair: Pair, damping: float, grad_a: Tensor, grad_b: Tensor, *, nearest: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute (g^A, g^B) from (g_A, g_B), with X = 0, or with the X nearest to the raw gradients."""
    dtype = torch.promote_types(pair.a.dtype, torch.float32)
    a, b, grad_a, grad_b = (tensor.to(dtype) for tensor in (pair.a, pair.b, grad_a, grad_b))
    grams = Gram.of(b.mT, damping), Gram.of(a, damping)
    inner, outer = (gram.inverse for gram in grams)
    moved_a = inner @ grad_a / pair.scale**2
    moved_b = (grad_b - b @ (inner @ (b.mT @ grad_b))) @ outer / pair.scale**2
    if not nearest:
        return moved_a, moved_b
    # (BᵀB)·X + X·(AAᵀ) = −g^A·Aᵀ in the eigenvectors of both; X is 0 where both eigenvalues are.
    left, right = grams
    sums = left.values.unsqueeze(-1) + right.values.unsqueeze(-2)
    turned = left.vectors.mT @ (-moved_a @ a.mT) @ right.vectors
    x = left.vectors @ torch.where(sums > 0, turned / sums, 0) @ right.vectors.mT
    return moved_a + x @ a, moved_b - b @ x
