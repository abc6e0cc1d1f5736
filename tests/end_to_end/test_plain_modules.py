"""Modules that torch exports in unusual ways: complex positions, and sequences whose length comes first."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import lorac
from lorac.testing import assert_close


class Rotary(nn.Module):
    """Positions as complex numbers, as in DeepSeek-V2 and Llama 4; `axis` is where they get the axis of the batch."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.q, self.axis = nn.Linear(6, 6), axis

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[1]).float(), torch.tensor([1.0, 0.3, 0.1]))
        turned = torch.polar(torch.ones_like(angles), angles).unsqueeze(self.axis)
        return torch.view_as_real(torch.view_as_complex(self.q(x).unflatten(-1, (3, 2))) * turned).flatten(2)


class Tutorial(nn.Module):
    """The language model of PyTorch's tutorial: (length, batch), with a mask that `nn.TransformerEncoder` looks at."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 10)
        self.embedding, self.encoder = nn.Embedding(20, 6), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(6, 20)

    def forward(self, src: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(len(src))
        return self.head(self.encoder(self.embedding(src), mask))


def _compile(model: nn.Module, target: str, x: Tensor, **given: object) -> tuple[lorac.Compiled, lorac.Compiled]:
    eager = lorac.compile(model, {"a": lorac.LoRA(r=1, targets=[target])}, example_inputs=(x,))
    for tensor in eager.adapters["a"].parameters():
        nn.init.normal_(tensor)
    adapters = dict(eager.adapters)
    return eager, lorac.compile(model, adapters, target="onnxruntime", example_inputs=(x,), **given)


@torch.no_grad()
@pytest.mark.parametrize("axis", [0, -3])
def test_computes_with_positions_as_complex_numbers(axis: int) -> None:
    x = torch.randn(2, 5, 6)
    eager, compiled = _compile(Rotary(axis).eval(), "q", x)
    for given in (x, x[:1]):
        assert_close(compiled(given), eager(given))


@torch.no_grad()
@pytest.mark.medium("test_computes_with_positions_as_complex_numbers; tests/frontend has the recorded branches")
def test_takes_any_batch_behind_the_length() -> None:
    src = torch.randint(0, 20, (5, 2))
    with pytest.warns(lorac.LoracWarning, match="takes the example's branches"):  # whether the mask is causal
        eager, compiled = _compile(Tutorial().eval(), "head", src, dynamic_shapes={"src": {1: Dim("batch")}})
    for given in (src, src[:, :1], src.repeat(1, 3)):
        assert_close(compiled(given), eager(given))
    with pytest.raises(lorac.InputMismatch, match="captured for"):
        compiled(src[:3])
