"""Routing: gate weights over experts, in torch ops whose meaning is the same in every backend.

``torch.topk`` and ONNX's TopK break ties differently, so neither is used: an expert's place is counted by comparisons,
and of equals the one with the lower index comes first, in eager and in every lowering.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def top_k(logits: Tensor, k: int) -> Tensor:
    """Which k of the last axis are largest, as a mask (…, L); ties go to the lowest index."""
    index = torch.arange(logits.shape[-1], device=logits.device)
    mine, other = logits.unsqueeze(-1), logits.unsqueeze(-2)
    before = (other > mine) | ((other == mine) & (index < index.unsqueeze(-1)))
    return before.sum(-1) < k


def topk_gate(logits: Tensor, k: int, temperature: float = 1.0) -> Tensor:
    """Weights (…, L): softmax(logits / temperature) over the k largest logits (…, L), zero elsewhere."""
    scaled = logits if temperature == 1 else logits / temperature
    return torch.softmax(scaled.masked_fill(~top_k(logits, k), -torch.inf), dim=-1)
