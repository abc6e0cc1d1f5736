"""Reductions: the results of their graphs, and mixtures of methods that keep their form."""

import pytest
import torch

import lorac
from lorac.ir.algebra.changes import Dense, LowRank, Sparse, SparseSum, compose, merge_bias, merge_weight
from lorac.ir.algebra.reduction import Params
from lorac.testing import HOSTS, Case, assert_close, assert_parity
from tests.ir.algebra.formulas import FORMULAS, IN, OUT


def test_outputs_of_each_form():
    names = {key: FORMULAS[key].reduced().outputs for key in ("sum of a factor", "rows and columns", "scatter")}
    assert names["sum of a factor"] == ("a", "b")
    assert names["rows and columns"] == ("a", "b", "c", "d")
    assert names["scatter"] == ("rows", "cols", "values")
    assert FORMULAS["new bias"].reduced().outputs == ("a", "b", "bias")
    assert FORMULAS["product of entries"].reduced().outputs == ("weight",)


def test_shapes_of_the_low_rank_form():
    formula = FORMULAS["rows and columns"]
    reduction = formula.reduced()
    W, b = formula.base()
    outputs = reduction(W, b, [formula.tensors()[name] for name in reduction.params])
    assert {name: tuple(t.shape) for name, t in outputs.items()} == {
        "a": (IN, 2),
        "b": (2, OUT),
        "c": (OUT,),
        "d": (IN,),
    }


@pytest.fixture
def cases():
    return {
        name: Case(variant, HOSTS["linear"])
        for name, variant in {
            "lora": lorac.LoRA(r=3, alpha=5),
            "dora": lorac.DoRA(r=2, alpha=3),
            "shira": lorac.SHiRA(r=1),
            "hydra": lorac.Hydra(r=1, r_sequential=2, branch_bias=True),
        }.items()
    }


def value_of(case):
    return case.live.pool["a"].changes["site"]


def test_forms_of_the_methods(cases):
    found = {name: type(value_of(case)) for name, case in cases.items()}
    assert found == {"lora": LowRank, "dora": LowRank, "shira": Sparse, "hydra": LowRank}


def test_a_mixture_of_lora_and_dora_is_exactly_low_rank(cases):
    """0.7 LoRA + 0.3 DoRA, by the two formulas as written, is one pair of rank 3 + 2 with an output scale."""
    lora, dora = cases["lora"], cases["dora"]
    mixed = compose([(0.7, value_of(lora)), (0.3, value_of(dora))], _unread)
    assert isinstance(mixed, LowRank)
    assert (mixed.rank, set(mixed.scales)) == (5, {"c"})
    W, b = lora.weight, lora.bias
    deltas = [case.variant.weight(W, _params(case)) - W for case in (lora, dora)]
    assert_close(merge_weight(mixed, W), W + 0.7 * deltas[0] + 0.3 * deltas[1])
    assert_close(merge_bias(mixed, b), b)


def _unread():
    pytest.fail("the base was read without need")


def _params(case):
    return Params(**case.a.tensors["site"])


@pytest.mark.medium("bound ones", cases=["training-*"])
@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("lora", "dora"), LowRank),
        (("dora", "hydra"), LowRank),
        (("shira", "shira"), SparseSum),
        (("lora", "shira"), Dense),
        (("dora", "shira"), Dense),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else value.__name__,
)
@pytest.mark.parametrize("mode", ["live", "fused"])
@pytest.mark.parametrize("gradients", [False, True], ids=["bound", "training"])
def test_mixtures_of_methods(cases, names, kind, mode, gradients):
    one, two = (cases[name] for name in names)
    adapters = {"a": one.a, "b": two.b}
    compiled = lorac.compile(one.model, adapters, mode=mode, active={"a": 0.7, "b": 0.3})
    base = one.base(one.x)
    with torch.set_grad_enabled(gradients):
        moved = one.compiled(one.a)(one.x) - base, two.compiled(two.b)(two.x) - base
        mixed = compiled(one.x)
    assert_parity(mixed, base + 0.7 * moved[0] + 0.3 * moved[1], base)
    terms = [(0.7, value_of(one)), (0.3, two.compiled(two.b).pool["b"].changes["site"])]
    assert isinstance(compose(terms, lambda: one.weight), kind)
