"""Which k of the last axis are largest: few ops, and of equals the first, as in eager."""

import pytest
import torch

import lorac
from lorac.variants._mixtures import top_k_mask
from tests.emitted import load_emitted


class Choosing(torch.nn.Module):
    """Answers the mask of its choice, and a product so that there is a site."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k, self.out = k, torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.out(x), top_k_mask(z, self.k).float()


@pytest.mark.medium("one shape", keep=["2-8-3"])
@pytest.mark.parametrize(("k", "experts", "levels"), [(1, 3, 1), (2, 8, 3), (7, 8, 2), (5, 300, 4), (90, 300, 2)])
@torch.no_grad()
def test_of_equals_the_first_are_chosen(k: int, experts: int, levels: int) -> None:
    host = Choosing(k).eval()
    example = (torch.randn(2, 4), torch.randn(2, 3, experts))
    compiled = lorac.compile(host, {"a": lorac.LoRA(r=2)}, target="onnxruntime", example_inputs=example, active=None)
    ops = [node.op_type for node in load_emitted(compiled).graph]
    assert {"TopK", "ScatterElements"} <= set(ops)
    assert not {"CumSum", "ReduceSum"} & set(ops)
    x, z = torch.randn(5, 4), torch.randint(levels, (5, 3, experts)).float()
    assert torch.equal(compiled(x, z)[1], top_k_mask(z, k).float())
    assert torch.equal(compiled(x, z)[1].sum(-1), torch.full((5, 3), float(k)))
