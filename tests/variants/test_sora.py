"""SoRA by hand."""

import pytest
import torch
from torch import nn

import lorac
from lorac.ir.algebra.changes import LowRank
from lorac.testing import HOSTS, Case
from lorac.training import prune_gates
from tests import parity


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def lora_of(tensors, r, alpha):
    return lorac.Adapter("a", lorac.LoRA(r=r, alpha=alpha, targets=("site",)), {"site": tensors})


@pytest.fixture
def case():
    return Case(lorac.SoRA(r=3, alpha=5), HOSTS["linear"])


@torch.no_grad()
def test_matches_a_worked_example_before_and_after_pruning():
    model = nn.Sequential()
    model.add_module("site", nn.Linear(2, 2, bias=False, dtype=torch.float64))
    model.site.weight.data.zero_()
    p = {"lora_A": torch.eye(2, dtype=torch.float64), "lora_B": tensor([[1, 1], [2, -1]]), "gate": tensor([0.5, 0])}
    adapter = lorac.Adapter("a", lorac.SoRA(r=2, alpha=4, targets=("site",)), {"site": p})
    x = tensor([[1, 2]])
    assert lorac.compile(model, {"a": adapter})(x).tolist() == [[1, 2]]
    small = prune_gates(adapter)
    assert (small.variant.r, small.variant.alpha) == (1, 2)
    assert small.tensors["site"]["lora_A"].tolist() == [[0.5, 0]]
    assert lorac.compile(model, {"a": small})(x).tolist() == [[1, 2]]


@torch.no_grad()
def test_closed_gates_drop_out(case):
    case.a.tensors["site"]["gate"][1] = 0
    small = lorac.compile(case.model, {"a": prune_gates(case.a)})
    parity.assert_parity(case.live(case.x), small(case.x), case.base(case.x))


@torch.no_grad()
def test_open_gates_are_lora(case):
    p = case.a.tensors["site"]
    p["gate"].fill_(1)
    lora = lorac.compile(case.model, {"a": lora_of({name: p[name] for name in ("lora_A", "lora_B")}, 3, 5)})
    parity.assert_parity(case.live(case.x), lora(case.x), case.base(case.x))


@pytest.mark.parametrize("gate", [[1.0, 1.0, 1.0], [0.3, -7.0, 0.0]])
@torch.no_grad()
def test_a_fresh_adapter_equals_the_base(case, gate):
    fresh = lorac.compile(case.model, {"a": case.variant}).adapters["a"]
    fresh.tensors["site"]["gate"].copy_(tensor(gate))
    assert torch.equal(lorac.compile(case.model, {"a": fresh})(case.x), case.base(case.x))


def test_a_closed_gate_still_learns(case):
    """Its rank gets no gradient, it does: it can open again."""
    case.a.tensors["site"]["gate"][1] = 0
    compiled = case.compiled(case.a).train()
    compiled(case.x).square().sum().backward()
    p = compiled.adapters["a"].tensors["site"]
    assert not p["lora_A"].grad[1].any() and not p["lora_B"].grad[:, 1].any()
    assert p["gate"].grad.all()


def test_gates_start_open_and_are_not_decayed(case):
    fresh = lorac.compile(case.model, {"a": case.variant})
    assert fresh.adapters["a"].tensors["site"]["gate"].all()
    decayed = {name for name, spec in case.variant.params(case.site).items() if spec.decay}
    assert decayed == {"lora_A", "lora_B"}


def test_reduces_to_low_rank(case):
    value = case.live.pool["a"].changes["site"]
    assert isinstance(value, LowRank)
    assert value.rank == 3
