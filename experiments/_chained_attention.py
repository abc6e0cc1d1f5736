"""The gradient of one attention head in almost linear time, by chained low-rank factors; a reference implementation.

Hu et al. 2024, arXiv 2406.03136. The loss is ½‖f·C3 − Y‖², with f = softmax(C1·W·C2ᵀ) by rows, and W (d, d) is learned.
Polynomial features φ of a degree give exp(⟨a, b⟩) ≈ ⟨φ(a), φ(b)⟩, and with them f, ∂loss/∂f and their products have
factors (L, k) whose chain never forms a matrix (L, L).
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lorac.errors import OptionError


@dataclass(frozen=True)
class AttentionHead:
    """The operands of the loss.

    Attributes:
        c1, c2: (L, d): the inputs whose products with W and without are queries and keys, with the head's scale folded
            into them; for LoRA's W = W*/s + B·A, c1 is s·X.
        c3, y: (L, d_v): values and what the outputs should be.
        w: (d, d), inputs first.
    """

    c1: Tensor
    c2: Tensor
    c3: Tensor
    y: Tensor
    w: Tensor


def exact_gradient(head: AttentionHead) -> Tensor:
    """Return ∂loss/∂W (d, d) in closed form, from matrices (L, L): C1ᵀ·(f∘q − diag(ρ)·f)·C2, ρ = rowsum(f∘q)."""
    f = torch.softmax(head.c1 @ head.w @ head.c2.t(), dim=-1)
    q = (f @ head.c3 - head.y) @ head.c3.t()
    weighted = f * q
    return head.c1.t() @ (weighted - weighted.sum(-1, keepdim=True) * f) @ head.c2


def chained_gradient(head: AttentionHead, degree: int) -> Tensor:
    """Return ∂loss/∂W (d, d) approximately, in time and memory linear in L, by features of a degree.

    Raises:
        OptionError: the degree is below 0.
    """
    u1, v1 = softmax_factors(head.c1 @ head.w, head.c2, degree)
    u2, v2 = u1 @ (v1.t() @ head.c3) - head.y, head.c3
    # f∘q has the row-wise Kronecker products of the factors of f and of q.
    product = (u1[:, :, None] * u2[:, None, :]).flatten(1), (v1[:, :, None] * v2[:, None, :]).flatten(1)
    rho = ((u1 @ (v1.t() @ v2)) * u2).sum(-1, keepdim=True)
    return (head.c1.t() @ product[0]) @ (product[1].t() @ head.c2) - (head.c1.t() @ (rho * u1)) @ (v1.t() @ head.c2)


def softmax_factors(queries: Tensor, keys: Tensor, degree: int) -> tuple[Tensor, Tensor]:
    """Return U (L, k) and V (L, k) with U·Vᵀ ≈ softmax(queries·keysᵀ) by rows, whose rows sum to 1.

    Args:
        queries, keys: (L, d), the head's scale folded into them.
        degree: of the polynomial that stands for exp.
    """
    u, v = (polynomial_features(one, degree) for one in (queries, keys))
    return u / (u @ v.sum(0))[:, None], v


def polynomial_features(x: Tensor, degree: int) -> Tensor:
    """Return φ(x) (L, C(d + degree, d)) of rows x (L, d), with ⟨φ(a), φ(b)⟩ = Σ_{t ≤ degree} ⟨a, b⟩ᵗ/t!.

    One feature for each monomial xᵅ up to the degree, divided by √(α₁!·…·α_d!).
    """
    if degree < 0:
        raise OptionError(f"a polynomial has no degree {degree}", next_step="give 0 or more; 4 is usual")
    columns = []
    for size in range(degree + 1):
        for chosen in itertools.combinations_with_replacement(range(x.shape[-1]), size):
            repeats = math.prod(math.factorial(chosen.count(one)) for one in set(chosen))
            columns.append(x[:, list(chosen)].prod(-1) / math.sqrt(repeats))
    return torch.stack(columns, dim=-1)


def softmax_error_bound(max_logit: float, degree: int) -> float:
    """Return the most by which ``softmax_factors`` is off at an entry, as a share of the entry; infinite for no bound.

    With |logit| ≤ b Taylor's remainder is at most δ = eᵇ·b^(g+1)/(g+1)! as a share of exp, and that of the quotient of
    two such sums at most 2δ/(1 − δ).
    """
    share = math.exp(max_logit) * max_logit ** (degree + 1) / math.factorial(degree + 1)
    return 2 * share / (1 - share) if share < 1 else math.inf
