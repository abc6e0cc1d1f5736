"""Each start's values by hand, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorac
from lorac.testing import assert_close
from lorac.training import initialisation as starts
from lorac.training.initialisation.from_activations import distribute_ranks
from tests.training.rules import linear


def matrix(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def host(weight: Tensor) -> Any:
    model = linear(weight.shape[1], weight.shape[0])
    model.site.weight.data.copy_(weight)
    return model


def falling(gradient: Tensor) -> Any:
    """A loss whose gradient at the weight is this one, whatever the batch."""
    return lambda model, batch: (model.site.weight * gradient).sum()


def lora(r: int = 1, alpha: float = 1) -> Any:
    return lorac.LoRA(r=r, alpha=alpha, targets=("site",))


def product(adapter: lorac.Adapter) -> Tensor:
    own = adapter.tensors["site"]
    return own["lora_B"] @ own["lora_A"]


def test_pissa_takes_the_first_component() -> None:
    """σ = 3, 2 and s = 2: the factors are √(3/2) each, and s·B·A is the part of σ = 3."""
    begun = starts.PiSSA()(lora(alpha=2), host(matrix([[3, 0, 0], [0, 2, 0]])))
    own = begun.tensors["site"]
    assert_close(own["lora_A"].abs(), matrix([[1.5**0.5, 0, 0]]))
    assert_close(own["lora_B"].abs(), matrix([[1.5**0.5], [0]]))
    assert_close(own["start_B"] @ own["start_A"], matrix([[3, 0, 0], [0, 0, 0]]))


def test_milora_takes_the_last() -> None:
    begun = starts.MiLoRA()(lora(alpha=2), host(matrix([[3, 0, 0], [0, 2, 0]])))
    assert_close(2 * product(begun), matrix([[0, 0, 0], [0, 2, 0]]))


def test_olora_takes_the_first_of_qr() -> None:
    """The first column (3, 4) has length 5; the second, (5, 10), lies (0.6·5 + 0.8·10) = 11 along it."""
    begun = starts.OLoRA()(lora(), host(matrix([[3, 5], [4, 10]])))
    own = begun.tensors["site"]
    assert_close(own["lora_B"].abs(), matrix([[0.6], [0.8]]))
    assert_close(own["lora_A"].abs(), matrix([[5, 11]]))
    assert_close(product(begun), matrix([[3, 6.6], [4, 8.8]]))


def test_lora_ga_takes_two_halves_of_the_gradient() -> None:
    """G = diag(5, 3): A is the first right vector and B the second left one, each times 2^¼/√4."""
    gradient, zeta = matrix([[5, 0, 0], [0, 3, 0]]), 2**0.25 / 2
    start = starts.LoRAGA(gamma=4, loss=falling(gradient))
    own = start(lora(alpha=2), host(matrix([[1, 2, 3], [4, 5, 6]])), [None]).tensors["site"]
    assert_close(own["lora_A"].abs(), matrix([[zeta, 0, 0]]))
    assert_close(own["lora_B"].abs(), matrix([[0], [zeta]]))
    assert_close(own["start_B"] @ own["start_A"], 2 * own["lora_B"] @ own["lora_A"])
    other = starts.LoRAGA(gamma=4, direction="A2rBr", peft=True, loss=falling(gradient))
    own = other(lora(), host(matrix([[1, 2, 3], [4, 5, 6]])), [None]).tensors["site"]
    assert_close(own["lora_A"].abs(), matrix([[0, 1, 0]]))
    assert_close(own["lora_B"].abs(), matrix([[5 * zeta], [0]]))


def test_lora_one_is_a_step_of_gradient_descent() -> None:
    """Of −diag(4, 1), r = 2, gamma = 4: B·A = −diag(4/4, 1/4)/4."""
    start = starts.LoRAOne(gamma=4, loss=falling(matrix([[4, 0], [0, 1]])))
    assert_close(product(start(lora(r=2), host(torch.eye(2)), [None])), matrix([[-1 / 4, 0], [0, -1 / 16]]))


def test_lora_sb_is_the_first_step_of_adamw() -> None:
    """η₁ = 1/(0.5·20) = 0.1 and sign(G) all ones: B·R·A = −0.1, of rank 1, and R = 0.2, its singular value."""
    start = starts.LoRASB(lr=1, warmup=0.5, steps=20, loss=falling(matrix([[3, 1], [2, 5]])))
    begun = start(lorac.LoRAXS(r=1, alpha=4, targets=("site",)), host(torch.eye(2)), [None, None])
    own = begun.tensors["site"]
    assert_close(4 * own["lora_latent"], matrix([[0.2]]))
    assert_close(4 * own["lora_B"] @ own["lora_latent"] @ own["lora_A"], matrix([[-0.1, -0.1], [-0.1, -0.1]]))


def test_lora_sb_of_full_rank_equals_the_full_step() -> None:
    gradient = matrix([[3, -1, 0], [2, 5, -2]])
    start = starts.LoRASB(lr=1, warmup=0.5, steps=20, loss=falling(gradient))
    own = start(lorac.LoRAXS(r=2, alpha=2, targets=("site",)), host(torch.ones(2, 3)), [None]).tensors["site"]
    assert_close(own["lora_B"] @ own["lora_latent"] @ own["lora_A"], -0.1 * gradient.sign())
    assert_close(own["lora_B"].t() @ own["lora_B"], torch.eye(2, dtype=torch.float64))


def test_corda_weighs_by_the_covariance_of_inputs() -> None:
    """Inputs lie along the first axis: W·C has its first component there, though W is larger along the second."""
    x = matrix([[2, 0], [-2, 0]])
    for mode, kept in (("ipm", [[1.0, 0], [0, 0]]), ("kpm", [[0, 0], [0, 2.0]])):
        begun = starts.CorDA(mode=mode)(lora(), host(matrix([[1, 0], [0, 2]])), [x])
        assert_close(product(begun), matrix(kept))


def test_eva_gives_ranks_where_inputs_vary() -> None:
    """Two layers in a row, one rank each to give: the first's inputs lie on a line, the second's on two."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)).double()
    model[0].weight.data.copy_(torch.eye(2))
    model[1].weight.data.copy_(torch.eye(2))
    x = matrix([[2, 0], [-2, 0], [0, 1], [0, -1]])
    fresh = lorac.LoRA(r=1, alpha=3, targets=("0", "1"))
    same = starts.EVA(rho=1)(fresh, model, [x])
    for own in same.tensors.values():
        assert_close(own["lora_A"], matrix([[1, 0]]))
        assert not own["lora_B"].any()
    white = starts.EVA(whiten=True)(lorac.LoRA(r=1, targets=("0",)), model, [x[:2], x[2:]])
    assert_close(white.tensors["0"]["lora_A"], matrix([[8**-0.25, 0]]))
    # The second layer's inputs have a variance of 5² along the second axis, which explains more than any other does.
    model[0].weight.data.copy_(matrix([[0.1, 0], [0, 5]]))
    given = starts.EVA(rho=2)(lorac.LoRA(r=1, alpha=3, targets=("0", "1")), model, [x])
    assert {path: len(own["lora_A"]) for path, own in given.tensors.items()} == {"0": 1, "1": 1}


def test_eva_moves_ranks() -> None:
    """Of six components, .5 .3 .2 and .9 .06 .04, three are the largest; of 0 ranks nothing is left."""
    shares = {"0": torch.tensor([0.5, 0.3, 0.2]), "1": torch.tensor([0.9, 0.06, 0.04])}
    assert distribute_ranks(shares, 3) == {"0": 2, "1": 1}
    assert distribute_ranks(shares, 1) == {"1": 1}


@pytest.mark.parametrize(("lr", "warmup", "steps", "first"), [(1, 0.25, 16, 0.25), (1, 0, 9, 1), (0.5, 0.5, 1, 0.5)])
def test_first_rate(lr: float, warmup: float, steps: int, first: float) -> None:
    assert starts.first_rate(lr, warmup, steps) == first
