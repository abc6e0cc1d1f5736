"""OpenAI's penalties of tokens that an answer holds already."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CountPenalty:
    """A logits processor that lowers the scores of tokens by how often the answer holds them.

    Attributes:
        prompt: tokens of the prompt, which do not count.
        presence: is subtracted once from tokens that occur.
        frequency: is subtracted each time that they do.
    """

    prompt: int
    presence: float
    frequency: float

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (rows, vocabulary) after texts (rows, length)."""
        answer = input_ids[:, self.prompt :]
        counts = torch.zeros_like(scores).scatter_add_(1, answer, torch.ones_like(answer, dtype=scores.dtype))
        return scores - self.frequency * counts - self.presence * (counts > 0)
