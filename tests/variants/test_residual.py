"""A method on the residual of a weight: by its equations, as a plain LoRA, and with the method's own fields."""

from types import SimpleNamespace

import pytest
import torch

import lorac
from lorac import Residual
from lorac.ir.algebra.changes import LowRank
from lorac.testing import HOSTS, Case, assert_close, conformance
from tests.oracles import residual as oracle

LORA = lorac.LoRA(r=3, alpha=5)
SLOW = ("onnxruntime", "two_", "half_")
CHECKS = conformance(Residual(method=LORA, r=1), oracle)


@pytest.mark.medium("the formula, and the kit's other checks of other methods", keep=["*-formula"])
@pytest.mark.slow("LoRA on a transposed weight; LoRA on a padded embedding", cases=["*-transposed-*", "*-padded-*"])
@pytest.mark.parametrize(
    "check",
    [pytest.param(c, id=str(c), marks=pytest.mark.slow if any(s in str(c) for s in SLOW) else ()) for c in CHECKS],
)
def test_conforms(check):
    check()


def test_by_hand():
    """W − B₀·A₀ + 2·B·A = [[1, 2], [3, 4]] − [[1, 1], [0, 0]] + 2·[[0, 0], [1, 0]]."""
    rows = {"start_B": [[1], [0]], "start_A": [[1, 1]], "lora_B": [[0], [1]], "lora_A": [[1, 0]]}
    p = SimpleNamespace(**{name: torch.tensor(value, dtype=torch.float64) for name, value in rows.items()})
    variant = Residual(method=lorac.LoRA(r=1, alpha=2), r=1)
    assert variant.weight(torch.tensor([[1.0, 2], [3, 4]]), p).tolist() == [[0, 1], [5, 4]]


def test_stays_low_rank_and_a_lora_is_the_same():
    case = Case(Residual(method=LORA, r=1), HOSTS["linear"])
    change = lorac.factors(case.a)["site"]
    assert isinstance(change, LowRank) and change.rank == 4
    assert_close(case.compiled(lorac.to_lora(case.a))(case.x), case.compiled(case.a)(case.x))


def test_keeps_targets_and_patterns_of_the_method():
    method = lorac.LoRA(r=3, alpha=5, dropout=0.1, alpha_pattern={"b": 7}, targets=("a", "b"), bias="lora_only")
    made = Residual.around(method, 2, {"b": 4})
    assert (made.targets, made.bias, made.dropout) == (("a", "b"), "lora_only", 0.1)
    here = made.at_path("b")
    assert (here.r, here.method.alpha) == (4, 7)
    assert made.at_path("a").method.alpha == 5
