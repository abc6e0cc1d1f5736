"""PEANuT: its functions against transformers', an example by hand, and its deep form through the kit."""

from types import SimpleNamespace

import pytest
import torch
from transformers.activations import ACT2FN

import lorac
from lorac import PEANuT
from lorac.ir.algebra.changes import LowRank
from lorac.testing import HOSTS, assert_close, conformance
from lorac.variants.peanut import ACTIVATIONS
from tests.oracles import peanut as equations


@pytest.mark.medium("the formula, and the kit's other checks of no hidden layers", keep=["*-formula"])
@pytest.mark.parametrize(
    "check", conformance(PEANuT(r=3, depth=2), equations, targets=(), hosts={"linear": HOSTS["linear"]}), ids=str
)
def test_hidden_layers_conform(check):
    check()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_functions_are_transformers(name):
    x = torch.linspace(-5, 8, 40, dtype=torch.float64)
    assert_close(ACTIVATIONS[name](x), ACT2FN[name](x))


def test_worked_example():
    """The sums of columns, cut at 0, go through B: the column (1, −2) gives 0, the column (3, 1) gives 4."""
    weight = torch.tensor([[1.0, 3.0], [-2.0, 1.0]])
    p = SimpleNamespace(peanut_A=torch.tensor([[1.0, 1.0]]), peanut_B=torch.tensor([[1.0], [0.0]]))
    assert PEANuT(r=1, scaling=2).weight(weight, p).tolist() == [[1.0, 11.0], [-2.0, 1.0]]


@torch.no_grad()
def test_starts_as_the_base_and_is_low_rank():
    model, x = HOSTS["linear"].model(), HOSTS["linear"].inputs((5,))
    compiled = lorac.compile(model, {"a": PEANuT(r=3, depth=1, targets=("site",))})
    assert torch.equal(compiled(x), model(x))
    value = compiled.pool["a"].changes["site"]
    assert isinstance(value, LowRank)
    assert value.rank == 3
