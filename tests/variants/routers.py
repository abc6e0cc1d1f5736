"""The parts that tests of routed methods share: one layer, its tokens, and LoRAs for it."""

import torch

import lorac
from tests.variants.away import away

X = torch.randn(3, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(7, 5)

    def forward(self, x):
        return self.line(x)


def host():
    return Line().double().eval()


def loras(model, inputs, ranks=(2, 3, 1, 2), targets=("line",)):
    return [
        away(lorac.LoRA(r=r, alpha=3 * r + i, targets=targets), model, inputs, f"l{i}") for i, r in enumerate(ranks)
    ]
