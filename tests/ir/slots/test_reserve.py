"""Sites that the targets of a ``Reserve`` match."""

import torch
from torch import nn

import lorac


class Multiplying(nn.Module):
    """Multiplies by a matrix of its own, and by a layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.last = nn.Parameter(torch.randn(5, 7)), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.last(x @ self.matrix)
        return answer


def test_a_list_names_matrices_too() -> None:
    reserve = lorac.Reserve(targets=["matrix", "last"], rank=2)
    compiled = lorac.compile(Multiplying(), reserve=reserve, example_inputs=(torch.ones(2, 5),))
    assert compiled.plans.keys() == {"matrix", "last"}
