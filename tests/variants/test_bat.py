"""BAT by hand."""

from types import SimpleNamespace

import pytest
import torch

import lorac
from lorac.ir.algebra.changes import Dense
from lorac.testing import HOSTS, Case, assert_close
from tests.limits import assert_apart
from tests.refusing import refuses


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def adapted(W, block):
    return lorac.BAT(r=block.shape[-1]).weight(W, SimpleNamespace(miss_block=block))


def test_worked_example_and_its_inverse():
    W, block = tensor([[1, 2], [3, 4]]), tensor([[[0, 1], [0, 0]]])
    merged = adapted(W, block)
    assert merged.tolist() == [[1, 4], [3, 7]]
    restored = (merged - block[0]) @ torch.linalg.inv(torch.eye(2, dtype=torch.float64) + block[0])
    assert_close(restored, W)


def test_blocks_of_size_1_scale_and_shift_outputs():
    W, b = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 1, 1, dtype=torch.float64)
    assert_close(adapted(W, b), W * (1 + b[:, 0]) + b[:, 0])


def test_rank_of_the_change_exceeds_r():
    case = Case(lorac.BAT(r=3), HOSTS["divisible"])
    block = case.a.tensors["site"]["miss_block"]
    moved = adapted(case.weight, block) - case.weight
    assert torch.linalg.matrix_rank(moved) > 3
    shards = lorac.MiSS(r=3).weight(case.weight, SimpleNamespace(miss_block=torch.randn(3, 6, dtype=torch.float64)))
    assert torch.linalg.matrix_rank(shards - case.weight) <= 3


def test_reduces_to_a_dense_weight():
    case = Case(lorac.BAT(r=3), HOSTS["divisible"])
    assert isinstance(case.live.pool["a"].changes["site"], Dense)


@torch.no_grad()
def test_two_together_are_a_sum_not_a_chain():
    """PEFT applies the second to the weight that the first left, which depends on their order."""
    case = Case(lorac.BAT(r=3), HOSTS["divisible"])
    W, (a, b) = case.weight, (adapter.tensors["site"]["miss_block"] for adapter in (case.a, case.b))
    compiled = case.compiled(case.a, case.b, mode="baked", active={"a": 1.0, "b": 1.0})
    assert_close(compiled.host.site.weight, adapted(W, a) + adapted(W, b) - W)
    chained, reversed_ = adapted(adapted(W, a), b), adapted(adapted(W, b), a)
    assert_apart(chained - W, reversed_ - W)
    assert_apart(compiled.host.site.weight - W, chained - W)


@pytest.mark.parametrize(("host", "r", "nearest"), [("divisible", 4, "r=3"), ("linear", 3, "r=1")])
def test_r_divides_both_sides(host, r, nearest):
    with refuses("site_unsupported", match="does not divide both sides") as error:
        lorac.compile(HOSTS[host].model(), {"a": lorac.BAT(r=r, targets=("site",))})
    assert error.value.nearest == nearest
