"""Recurrent layers and Fourier transforms, whose own parts write in place or have sizes of the example alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorac
from lorac.testing import assert_close

WIDTH = 8


class Around(nn.Module):
    """A function of a layer's outputs, between two layers.

    Args:
        function: (x (batch, 4, 8)) -> (batch, 4, features).
        inside: the modules that the function calls.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], features: int, *inside: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, WIDTH), nn.Linear(features, 3)
        self.inside, self.function = nn.ModuleList(inside), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def stepped(kind: str, **options: Any) -> Around:
    """Return a model that calls a cell once for each of four tokens."""
    cell = getattr(nn, kind)(WIDTH, 5, **options)

    def run(x: Tensor) -> Tensor:
        state = cell(x[:, 0])  # which begins with zeros
        outputs = [state]
        for token in range(1, 4):
            state = cell(x[:, token], state)
            outputs.append(state)
        return torch.stack([one[0] if isinstance(one, tuple) else one for one in outputs], 1)

    return Around(run, 5, cell)


def whole(**options: Any) -> Around:
    """Return a model that calls a recurrent layer."""
    layer = nn.RNN(WIDTH, 5, batch_first=True, **options)
    return Around(lambda x: layer(x)[0], 10 if options.get("bidirectional") else 5, layer)


def filtered(x: Tensor) -> Tensor:
    """Damp frequencies of the tokens, as a global filter does."""
    damping = torch.linspace(1, 0.2, 3).unsqueeze(-1)
    return torch.fft.irfft(torch.fft.rfft(x, dim=1, norm="ortho") * damping, n=4, dim=1, norm="ortho")


MODELS: dict[str, Callable[[], Around]] = {
    "LSTMCell": lambda: stepped("LSTMCell"),
    "GRUCell": lambda: stepped("GRUCell"),
    "GRUCell without biases": lambda: stepped("GRUCell", bias=False),
    "RNNCell": lambda: stepped("RNNCell"),
    "RNNCell, relu": lambda: stepped("RNNCell", nonlinearity="relu"),
    "RNN": whole,
    "RNN, relu": lambda: whole(nonlinearity="relu", num_layers=2, bidirectional=True),
    "rfft and irfft": lambda: Around(filtered, WIDTH),
    "rfft": lambda: Around(lambda x: torch.fft.rfft(x, dim=-1).abs(), 5),
    "fft": lambda: Around(lambda x: torch.fft.fft(torch.fft.fft(x, dim=-1), dim=1).real, WIDTH),
    "rfft beside a write in place": lambda: Around(lambda x: torch.zeros_like(x).copy_(filtered(x)), WIDTH),
}


@pytest.mark.medium("layers of a kind", keep=["LSTMCell", "RNN", "rfft and irfft"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_programs_compute_recurrent_layers_and_transforms(name: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name]().eval(), torch.randn(2, 4, 6)
    adapters = {"a": lorac.LoRA(r=2, targets=["first"])}
    compiled = lorac.compile(model, adapters, target="onnxruntime", example_inputs=(x,))
    for rows in (x, torch.randn(3, 4, 6)):
        assert_close(compiled(rows), model(rows))
