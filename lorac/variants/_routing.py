"""Routing: gate weights over experts and draws of them, in torch ops whose meaning is the same in every backend.

``torch.topk`` and ONNX's TopK break ties differently, so neither is asked for places: only for the k-th largest value,
which is the same whoever breaks the ties. What is larger is chosen, and of its equals as many as are left, those with
the lowest indices first, in eager and in every lowering. It takes O(L) for L experts, where comparing them all with
each other would take O(L²).
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def top_k(logits: Tensor, k: int) -> Tensor:
    """Which k of the last axis are largest, as a mask (…, L); ties go to the lowest index."""
    if k >= logits.shape[-1]:
        return torch.ones_like(logits, dtype=torch.bool)
    least = torch.topk(logits, k, dim=-1).values[..., -1:]
    above, equal = logits > least, logits == least
    left = k - above.sum(-1, keepdim=True)
    return above | (equal & (equal.to(torch.int64).cumsum(-1) <= left))


def top_k_softmax(logits: Tensor, k: int, temperature: float = 1.0) -> Tensor:
    """Weights (…, L): softmax(logits / temperature) over the k largest logits (…, L), zero elsewhere."""
    scaled = logits if temperature == 1 else logits / temperature
    return torch.softmax(scaled.masked_fill(~top_k(logits, k), -torch.inf), dim=-1)


def add_gumbel_noise(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Logits (…, n) with noise, in float64: the order of the k largest is that of k draws without putting back.

    The probabilities are softmax(logits); the noise is Gumbel's (Gumbel-top-k).
    """
    uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64).to(logits.device)
    noise = -torch.log(-torch.log(uniform.clamp(torch.finfo(torch.float64).tiny, 1 - torch.finfo(torch.float64).eps)))
    return logits.double() + noise


def ordered_log_prob(logits: Tensor, chosen: Tensor) -> Tensor:
    """log Q of drawing experts one after the other without putting back: Σ_j log(q_j / (1 − Σ of those before)).

    Args:
        logits: (…, n); q is their softmax.
        chosen: (…, k) distinct indices, in the order in which they were drawn.

    Returns:
        (…), with gradients for the logits.
    """
    picked = logits.gather(-1, chosen)
    left, total = logits, torch.zeros_like(picked[..., 0])
    for j in range(chosen.shape[-1]):
        total = total + picked[..., j] - left.logsumexp(-1)
        left = left.scatter(-1, chosen[..., j : j + 1], -torch.inf)
    return total
